"""CSV, Parquet and Arrow (Feather) logs, a block at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import STEP
from stabilitylab.logs.columns import choose_columns
from stabilitylab.logs.csv_rows import RUN_NAMES, delimiter_of, read_tables
from stabilitylab.logs.log import BLOCK_ROWS, Log, RowBlock, whole_steps
from stabilitylab.logs.reading import MODES, Reading
from stabilitylab.logs.source import LogFile
from stabilitylab.telemetry import LOSS

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BLOCK_BYTES = 4 << 20
_KEPT_ROWS = 1_000_000
_NUMBER = re.compile(r"[-+]?[\d.]+(?:[eE][-+]?\d+)?")
# Trainers also write these for a value that was not logged.
_NULLS = ["", "null", "None", "N/A", "NA", "-"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _TableLog(Log):
    def _batches(self) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError

    def blocks(self) -> Iterator[RowBlock]:
        row = 0
        for batch in self._batches():
            yield from self._block(batch, row)
            row += batch.num_rows

    def _block(self, batch: pa.RecordBatch, row: int) -> Iterator[RowBlock]:
        count = batch.num_rows
        numbers = {
            signal: _numbers(batch.column(name), f"{self.path}, column {name!r}", row)
            for signal, name in self.columns.items()
        }
        if STEP in numbers:
            steps_N, keep_N = numbers.pop(STEP)
            steps_N = np.where(keep_N, steps_N, 0.0)
        else:
            steps_N, keep_N = np.arange(row, row + count, dtype=np.float64), np.ones(count, dtype=np.bool_)
        keep_N = keep_N & np.logical_or.reduce([logged for _, logged in numbers.values()])
        if keep_N.any():
            yield RowBlock(
                whole_steps(steps_N[keep_N], f"{self.path}, column {self.columns.get(STEP)!r}"),
                {signal: values[keep_N] for signal, (values, _) in numbers.items()},
                {signal: logged[keep_N] for signal, (_, logged) in numbers.items()},
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CsvLog(_TableLog):
    """Comma-, semicolon- or tab-separated text with one clean header, also compressed."""

    delimiter: str
    source: LogFile
    kept: tuple[RowBlock, ...] | None = None

    @classmethod
    def open_clean(cls, source: LogFile, *, loss: str | None = None, step: str | None = None) -> Self | None:
        """The file, where it is one table without oddities; None: ``csv_rows`` must read it.

        Raises:
            InputError: it has no loss column, or several that could be.
        """
        header = source.head().lstrip(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0].decode(errors="replace")
        delimiter = delimiter_of(header)
        if delimiter in " |":
            return None
        names = [name.strip().strip('"') for name in header.rstrip().split(delimiter)]
        odd = header.startswith("#") or len(set(names)) < len(names)
        if odd or any(name.endswith("__MIN") or _NUMBER.fullmatch(name) for name in names):
            return None
        lower = {name.lower() for name in names}
        if lower & {"value", *RUN_NAMES, *MODES}:
            return None  # perhaps a table of one value per row, of several runs, or of validation too
        try:
            columns = choose_columns(names, source=source.path, loss=loss, step=step)
        except InputError:
            return None  # once ``csv_rows`` counts the values, the choice may be clear; if not, it refuses the file
        if STEP not in columns:
            return None  # a column by another name may count, which only its values show
        log = cls(
            path=source.path,
            columns=columns,
            format="CSV",
            delimiter=delimiter,
            source=source,
            left_out=Counter(),
        )
        return log._surveyed()

    def _surveyed(self) -> Self | None:
        """The log itself, read to the end once, its blocks kept where they are few; None where anything is odd."""
        kept: list[RowBlock] | None = []
        rows = with_loss = 0
        last: int | None = None
        try:
            for block in _TableLog.blocks(self):
                rows += len(block)
                with_loss += int(block.logged[LOSS].sum())
                steps_N = block.steps
                back_N = np.flatnonzero(np.diff(steps_N, prepend=steps_N[0] if last is None else last) < 0)
                if (steps_N[back_N] <= 1).any():
                    return None  # counting begins again: several runs
                last = int(steps_N[-1])
                if kept is not None:
                    kept.append(block)
                    kept = kept if rows <= _KEPT_ROWS else None
        except InputError:
            return None
        if not with_loss or self.left_out:
            return None
        return replace(self, kept=None if kept is None else tuple(kept))

    def blocks(self) -> Iterator[RowBlock]:
        if self.kept is not None:
            return iter(self.kept)
        return _TableLog.blocks(self)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        # Cells are parsed as numbers; one that is none leaves the whole file to another reader.
        wanted = list(self.columns.values())
        skipped = self.left_out

        def count(row: Any) -> str:
            skipped["rows of too few or too many cells"] += 1
            return "skip"

        options: dict[str, Any] = {
            "read_options": pa.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
            # A line cut short by a kill has too few cells, one written by two processes at once too many.
            "parse_options": pa.csv.ParseOptions(delimiter=self.delimiter, invalid_row_handler=count),
            "convert_options": pa.csv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, pa.float64()),
                null_values=_NULLS,
                strings_can_be_null=True,
            ),
        }
        skipped.clear()
        try:
            with self.source.open() as raw, pa.csv.open_csv(pa.PythonFile(raw), **options) as reader:
                yield from reader
        except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
            raise InputError(f"{self.path} cannot be read as CSV: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetLog(_TableLog):
    """A Parquet file with one row per step."""

    @classmethod
    def open(cls, path: Path, *, loss: str | None = None, step: str | None = None) -> Self:
        names = list(_parquet(path).schema_arrow.names)
        if {"family", "site", "statistic", "value"} <= set(names):
            raise InputError(f"{path} is one of the files of a run folder: give the folder above telemetry/")
        return cls(
            path=path, format="Parquet", columns=choose_columns(names, source=path, loss=loss, step=step)
        )

    def _batches(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from _parquet(self.path).iter_batches(BLOCK_ROWS, columns=list(self.columns.values()))
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{self.path} is damaged: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowLog(_TableLog):
    """An Arrow file, which Feather writes, with one row per step."""

    @classmethod
    def open(cls, path: Path, *, loss: str | None = None, step: str | None = None) -> Self:
        names = list(_arrow(path).schema.names)
        return cls(
            path=path, format="Arrow", columns=choose_columns(names, source=path, loss=loss, step=step)
        )

    def _batches(self) -> Iterator[pa.RecordBatch]:
        reader = _arrow(self.path)
        try:
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                for at in range(0, batch.num_rows, BLOCK_ROWS):
                    yield batch.slice(at, BLOCK_ROWS)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{self.path} is damaged: {str(error).splitlines()[0]}") from None


def read_table_file(path: Path) -> Reading | None:
    """The rows of a Parquet or Arrow file whose columns of text tell runs or validation apart, that holds one value a row, or in
    which no column is named like a step; None: it is none of these."""
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    schema = _parquet(path).schema_arrow if is_parquet else _arrow(path).schema
    lower = {name.lower(): name for name in schema.names}
    if {"family", "site", "statistic"} <= lower.keys():
        return None
    tells = any(n in lower and not _is_number(schema.field(lower[n]).type) for n in MODES)
    if not tells and not lower.keys() & {"value", *RUN_NAMES} and _names_a_step(schema.names, path):
        return None
    kind: type[_TableLog] = ParquetLog if is_parquet else ArrowLog
    every = kind(path=path, columns={name: name for name in schema.names})
    reading = read_tables(schema.names, every._batches, LogFile(path))
    reading.format = "Parquet" if is_parquet else "Arrow"
    return reading


def _names_a_step(names: list[str], path: Path) -> bool:
    try:
        return STEP in choose_columns(names, source=path)
    except InputError:
        return False


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _arrow(path: Path) -> pa.RecordBatchFileReader:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a complete Arrow file: {str(error).splitlines()[0]}") from None


def _parquet(path: Path) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}") from None


def _numbers(column: pa.Array, source: str, first_row: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A column as floats, and where it holds any."""
    if pa.types.is_float64(column.type):
        return floats_of(column)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        import pyarrow.compute as pc  # a tenth of a second: only for cells of text

        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.is_in(column, pa.array(_NULLS)), None, column)
    elif not (
        pa.types.is_floating(column.type)
        or pa.types.is_integer(column.type)
        or pa.types.is_boolean(column.type)
        or pa.types.is_null(column.type)
        or pa.types.is_decimal(column.type)
    ):
        raise InputError(f"{source} holds {column.type}, not numbers")
    try:
        numbers = column.cast(pa.float64(), safe=False)
    except pa.ArrowInvalid:
        numbers = pa.array(
            [_number(cell, source, first_row + i) for i, cell in enumerate(column.to_pylist())], pa.float64()
        )
    logged_N = np.asarray(numbers.is_valid())
    return np.asarray(numbers.fill_null(0.0), dtype=np.float64), logged_N


def floats_of(column: pa.Array) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A column's floats, from its buffers: Arrow's own way to NumPy goes through pandas, whose import takes longer than most
    logs."""
    count, begin = len(column), column.offset
    present, data = column.buffers()
    values_N = np.frombuffer(data, dtype=np.float64)[begin : begin + count]
    if present is None:
        return values_N, np.ones(count, dtype=np.bool_)
    bits_N = np.unpackbits(np.frombuffer(present, dtype=np.uint8), bitorder="little")
    logged_N = bits_N[begin : begin + count].astype(np.bool_)
    return np.where(logged_N, values_N, 0.0), logged_N


def _number(cell: Any, source: str, row: int) -> float | None:
    if cell is None:
        return None
    text = str(cell)
    if text.lower() in ("true", "false"):
        return float(text.lower() == "true")
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{source}, row {row + 1}: {text[:40]!r} is not a number") from None

"""JSON lines that form a table: every line an object of the same names with numbers or null, as most trackers write them.

Arrow parses them some ten times faster than one line at a time. Anything else (text, lists, objects within objects, a name that
comes later, ranks, steps that repeat or go back) goes to ``json_lines.py``: ``open_clean`` then gives None. Both read the same and
say the same about it; a test compares them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.json
from numpy.typing import NDArray

from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import STEP
from stabilitylab.logs.json_lines import PARTS
from stabilitylab.logs.log import Log, RowBlock, whole_steps
from stabilitylab.logs.reading import MODES, Reading
from stabilitylab.logs.segment_columns import SegmentColumns, columns_of, notes_of
from stabilitylab.logs.source import LONGEST_LINE, LogFile
from stabilitylab.logs.table_files import floats_of
from stabilitylab.telemetry import LOSS

MOST_KEPT = 16_000_000  # numbers; a longer log is read a second time
_LARGEST = 3.4028234e38  # the end of float32's range: infinity in stores without one

Columns = dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]]


class OddTableError(Exception):
    """The file is no such table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonTableLog(Log):
    """A log in such a file.

    Attributes:
        source: the file.
        names: all columns' names.
        notes: sentences about the log.
        kept: the blocks, where they are few.
    """

    source: LogFile
    names: tuple[str, ...]
    notes: tuple[str, ...]
    kept: tuple[RowBlock, ...] | None

    @classmethod
    def open_clean(
        cls,
        source: LogFile,
        head: bytes,
        reading: Reading,
        *,
        loss: str | None = None,
        step: str | None = None,
    ) -> Self | None:
        """The file, where it is such a table; None: ``reading`` must read it."""
        names = _names(head)
        if names is None:
            return None
        path, part, left_out = source.path, SegmentColumns(), Counter[str]()
        held: list[Columns] | None = []
        try:
            for columns in _tables(source, names, left_out):
                part.add_columns(columns)
                if held is not None:
                    held.append(columns)
                    held = held if part.rows * len(names) <= MOST_KEPT else None
            chosen = columns_of(reading, part, path, loss=loss, step=step)
        except (OddTableError, InputError):
            return None
        counter = chosen.get(STEP)
        # A missing loss has two messages: for null, and for no entry at all.
        if counter is None or part.backward[counter] or part.nulls[chosen[LOSS]]:
            return None
        log = cls(
            path=path,
            columns=chosen,
            format=reading.format,
            left_out=left_out,
            source=source,
            names=names,
            notes=tuple(notes_of(part, chosen)),
            kept=None,
        )
        try:
            kept = None if held is None else tuple(block for some in held for block in log._blocks(some))
            _check_steps(log.blocks() if kept is None else iter(kept))
        except (OddTableError, InputError):
            return None
        return replace(log, kept=kept)

    def blocks(self) -> Iterator[RowBlock]:
        if self.kept is not None:
            yield from self.kept
            return
        for columns in _tables(self.source, self.names, Counter()):
            yield from self._blocks(columns)

    def _blocks(self, columns: Columns) -> Iterator[RowBlock]:
        steps_N, keep_N = columns[self.columns[STEP]]
        signals = {signal: columns[name] for signal, name in self.columns.items() if signal != STEP}
        keep_N = keep_N & np.logical_or.reduce([logged for _, logged in signals.values()])
        if keep_N.any():
            yield RowBlock(
                whole_steps(steps_N[keep_N], f"{self.path}, {self.columns[STEP]!r}"),
                {signal: values[keep_N] for signal, (values, _) in signals.items()},
                {signal: logged[keep_N] for signal, (_, logged) in signals.items()},
            )


def _names(head: bytes) -> tuple[str, ...] | None:
    """The names in the first line, if it holds nothing but numbers and null."""
    first, *rest = head.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)
    if not rest or not first.startswith(b"{"):
        return None
    try:
        record = json.loads(first)
    except ValueError:
        return None
    plain = all(value is None or type(value) in (int, float) for value in record.values())
    return tuple(record) if plain and record and not record.keys() & {*MODES, *PARTS} else None


def _tables(source: LogFile, names: tuple[str, ...], left_out: Counter[str]) -> Iterator[Columns]:
    """The file's columns, some ten thousand lines at a time."""
    schema = pa.schema([(name, pa.float64()) for name in names])
    parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    read = pa.json.ReadOptions(use_threads=False, block_size=2 * LONGEST_LINE)
    for number, chunk in enumerate(source.chunks()):
        if not number:
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        if not chunk.endswith((b"\n", b"\r")):
            lines = chunk.rpartition(b"\n")
            if not _is_json(lines[2]):
                left_out["a last line cut short"] += 1
                chunk = lines[0]
        if not chunk.strip():
            continue
        try:
            table = pa.json.read_json(pa.BufferReader(chunk), read_options=read, parse_options=parse)
        except pa.ArrowInvalid:
            raise OddTableError from None
        columns = {}
        for name in names:
            pieces = [floats_of(piece) for piece in table.column(name).chunks]
            values_N = np.concatenate([values for values, _ in pieces])
            values_N = np.where(np.abs(values_N) >= _LARGEST, np.copysign(np.inf, values_N), values_N)
            columns[name] = values_N, np.concatenate([logged for _, logged in pieces])
        yield columns


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _check_steps(blocks: Iterator[RowBlock]) -> None:
    """Raises OddTableError where a step comes again: ``json_lines`` joins the rows of one step."""
    last = -math.inf
    losses = 0
    for block in blocks:
        if block.steps[0] <= last or not (np.diff(block.steps) > 0).all():
            raise OddTableError
        last = float(block.steps[-1])
        losses += int(block.logged[LOSS].sum())
    if not losses:
        raise OddTableError

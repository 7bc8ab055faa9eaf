"""CSV that is not one clean table: resumed, appended, exported and hand-edited files.

It reads a header repeated in the middle (Keras' ``CSVLogger(append=True)``), a header that grew a column, comments, padded cells
(YOLOv5), a decimal comma with semicolons, UTF-16, and W&B's panel export with several runs side by side. It leaves out and counts a
row with more or fewer cells than the header. ``table_files`` reads clean files, many times faster.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import is_evaluation
from stabilitylab.logs.pattern import LineValues, number, without_colours
from stabilitylab.logs.reading import MODES, Reading, Row, text_rows
from stabilitylab.logs.source import LogFile

if TYPE_CHECKING:
    import pyarrow as pa

NULLS = frozenset(("", "null", "none", "n/a", "na", "-", "<na>", "no log", "no_log"))
_METRIC_NAMES = ("metric", "metric_name", "metric.name", "metricname", "key", "tag", "variable", "name")
# Columns that name a row's run or process.
RUN_NAMES = ("run_name", "run.name", "run_id", "run id", "run_uuid", "run", "run.hash", "rank", "local_rank")
_NAME = r"[A-Za-z_][\w./%()-]*"
_HINT = re.compile(r"sep=")  # tells Excel the delimiter
_CLOCKS = ("wall time", "timestamp", "time", "relative time", "datetime")
_DECIMAL_COMMA = re.compile(r"^-?(?:\d+|\d{1,3}(?:\.\d{3})+),\d+(?:[eE][-+]?\d+)?$")
_THOUSANDS = re.compile(r"^-?[1-9]\d{0,2}(?:\.\d{3})+$")  # 12.000 beside 2,31
_RULE = re.compile(r"\s*-{2,}[\s-]*")
_WANDB = re.compile(r"^(?P<run>.+) - (?P<metric>[^ ].*?)(?:__MIN|__MAX)?$")


def delimiter_of(header: str) -> str:
    """The delimiter of a header's cells: a bar for a Markdown table, a blank for cells parted by blanks."""
    found = max(",;\t", key=header.count)
    if header.lstrip().startswith("|") or ("|" in header and found not in header):
        return "|"
    return found if found in header or len(header.split()) < 2 else " "


def is_commented_header(line: str) -> bool:
    """Whether a comment is a table's header: only names, a loss among them (NumPy's savetxt)."""
    names = [name.strip() for name in re.split(r"[,;\t]|\s+", line.lstrip("# \t")) if name.strip()]
    return len(names) > 1 and "loss" in line.lower() and all(re.fullmatch(_NAME, name) for name in names)


def is_blank_table(lines: Sequence[str]) -> bool:
    """Whether words, "loss" among them, stand above rows of as many numbers, parted by blanks; the words may be a comment."""
    if len(lines) < 2:
        return False
    names, first = lines[0].lstrip("# \t").split(), lines[1].split()
    return (
        len(names) == len(first) > 1
        and "loss" in lines[0].lower()
        and not any(number(name) is not None for name in names)
        and all(re.fullmatch(_NAME, name) for name in names)
        and sum(number(cell) is not None for cell in first) * 2 > len(first)
        and all(len(line.split()) == len(names) for line in lines[1:-1])
    )


def read_csv_rows(source: LogFile) -> Reading:
    """Every row under the header above it.

    Raises:
        InputError: there is no header.
    """
    first = _first_line(source)
    delimiter = delimiter_of(first)
    cells = next(_lines([first], delimiter))
    if all(_value(cell, delimiter) is not None or _null(cell) for cell in cells):
        raise InputError(
            f"{source.name} has no header: its first row is numbers; "
            f"put the columns' names above it, such as {delimiter.join(('step', 'loss'))}"
        )
    return _reading_of([cell.strip() for cell in cells], delimiter, source)


def read_tables(
    names: Sequence[str], tables: Callable[[], Iterator[pa.RecordBatch]], source: LogFile
) -> Reading:
    """Every row of Arrow's tables, read as the same cells of a CSV file would be."""
    reading = _reading_of(list(names), "\t", source)
    assert reading.pieces is not None
    make = reading.pieces

    def rows() -> Iterator[Row]:
        reading.left_out.clear()
        pieces = make()
        assert isinstance(pieces, CsvPieces)
        pieces.state["names"] = list(names)
        for table in tables():
            for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
                pieces.state["row"] += 1
                yield from pieces.row(["" if cell is None else str(cell) for cell in row])

    reading.rows, reading.pieces = rows, None
    return reading


def _reading_of(names: list[str], delimiter: str, source: LogFile) -> Reading:
    """The reader of rows below these names."""
    runs = {m["run"] for name in names if (m := _WANDB.match(name))}
    form = "W&B panel export" if runs and any(n.endswith("__MIN") for n in names) else "CSV"
    parts = [
        n for n in names if re.fullmatch(r"train/(box|obj|cls|dfl|seg|pose|kobj|angle)(_loss|_om|_oo)?", n)
    ]
    if {"lr/pg0", "x/lr0"} & {*names}:  # RT-DETR's and later ones'; YOLOv10's of both heads
        parts = [n for n in names if re.fullmatch(r"train/\w+_(loss|om|oo)", n)]
    if len(parts) > 1:
        form = "YOLO results"
    several = form.startswith("W&B") and len(runs) > 1
    lower = [name.lower() for name in names]
    # A table of one value per row: its name in one column, the value in another (MLflow's export, pandas.melt).
    long = (
        next((names[lower.index(n)] for n in _METRIC_NAMES if n in lower), None) if "value" in lower else None
    )
    of_run = next((names[lower.index(n)] for n in RUN_NAMES if n in lower), None)
    modes = [name for name in names if name.lower() in MODES]
    if lower == ["wall time", "step", "value"]:
        form = "TensorBoard CSV export"
    elif {"step", "value"} <= {*lower} <= {"step", "value", *_CLOCKS}:
        form = "CSV of one tag"  # Neptune, Comet
    reading = Reading(
        format=form,
        rows=lambda: text_rows(source, reading),
        pieces=lambda: CsvPieces(reading, delimiter, several, parts, long, of_run, modes),
    )
    if form in ("TensorBoard CSV export", "CSV of one tag"):
        reading.losses = (names[lower.index("value")],)
        reading.notes.append("the export of one tag, taken for the loss")
    if len(parts) > 1:
        reading.losses = ("train/loss",)
        reading.notes.append(f"the loss is the sum of {', '.join(parts)}")
    return reading


class CsvPieces:
    """Reads rows under the header above them.

    Args:
        reading: counts what is left out.
        delimiter: the sign between cells.
        several: whether runs are side by side (W&B).
        parts: columns whose sum is the loss (YOLO).
        long: the column that names each row's value, where there is one.
        of_run: the column that names each row's run, where there is one.
        modes: the columns whose words tell training from validation.
    """

    def __init__(
        self,
        reading: Reading,
        delimiter: str,
        several: bool,
        parts: Sequence[str],
        long: str | None = None,
        of_run: str | None = None,
        modes: Sequence[str] = (),
    ) -> None:
        self._reading, self._delimiter, self._several, self._parts = reading, delimiter, several, parts
        self._long, self._of_run, self._modes = long, of_run, modes
        self.state: dict[str, Any] = {"names": [], "row": 0}

    def end(self) -> Iterator[Row]:
        """No rows: nothing is held back."""
        return iter(())

    def take(self, piece: bytes) -> Iterator[Row]:
        """The rows of these lines."""
        reading, delimiter, state = self._reading, self._delimiter, self.state
        for line in _lines(_decoded(piece, first=not state["names"]), delimiter):
            if not line or (len(line) == 1 and not line[0].strip()):
                continue
            if not state["names"] and line[0].startswith("#") and is_commented_header(delimiter.join(line)):
                line = [cell for cell in (line[0].lstrip("# "), *line[1:]) if cell]
            if line[0].lstrip().startswith("#") or (not state["names"] and _HINT.match(line[0])):
                reading.left_out["comments"] += 1
                continue
            cells = [cell.strip() for cell in line]
            names = state["names"]
            if not names or _is_header(cells, names, delimiter):
                if names:
                    reading.left_out["headers repeated"] += 1
                state["names"] = cells
                continue
            state["row"] += 1
            if len(cells) != len(names):
                reading.left_out["rows of too few or too many cells"] += 1
                continue
            yield from self.row(cells)

    def row(self, cells: Sequence[str]) -> Iterator[Row]:
        """The rows of one line of cells, below the names in ``state``."""
        reading, names, parts = self._reading, self.state["names"], self._parts
        named = dict(zip(names, cells, strict=True)) if self._long or self._of_run or self._modes else {}
        if any(is_evaluation(named[mode]) for mode in self._modes if mode in named):
            reading.left_out["rows of validation"] += 1
            return
        if self._delimiter != "," and any(map(_DECIMAL_COMMA.match, cells)):
            cells = [cell.replace(".", "") if _THOUSANDS.match(cell) else cell for cell in cells]
        values: LineValues = {}
        for name, cell in zip(names, cells, strict=True):
            if name == self._of_run:
                continue
            name = "epoch" if name.lower() == "epoch" else name
            value = _value(cell, self._delimiter)
            if value is not None or _null(cell):
                values[name] = value
            elif "loss" in name.lower() or name.lower() in ("step", "iteration", "global_step"):
                where = f"column {name!r}, row {self.state['row']}"
                reading.damage("cells that are not numbers", f"{where}: {cell[:40]!r} is not a number")
        if self._long is not None:
            values = {n: v for n, v in values.items() if n.lower() != "value"}
            value = next(c for n, c in named.items() if n.lower() == "value")
            values[named[self._long]] = _value(value, self._delimiter)
        if len(parts) > 1:
            held = [values.get(part) for part in parts]
            values["train/loss"] = None if None in held else sum(x for x in held if x is not None)
        if self._several:
            yield from _side_by_side(values)
        else:
            yield _part(self._of_run, named), values


def _part(column: str | None, cells: Mapping[str, str]) -> str:
    if column is None:
        return ""
    return f"rank {cells[column]}" if "rank" in column.lower() else cells[column]


def _lines(text: Sequence[str], delimiter: str) -> Iterator[list[str]]:
    if delimiter == " ":
        return (line.split() for line in text if not _RULE.fullmatch(line))
    if delimiter == "|":
        cells = (line.strip().strip("|").split("|") for line in text)
        return (line for line in cells if not all(re.fullmatch(r"[\s:+-]*", cell) for cell in line))
    return csv.reader(text, delimiter=delimiter)


def _side_by_side(values: LineValues) -> Iterator[Row]:
    shared = {name: value for name, value in values.items() if not _WANDB.match(name)}
    runs: dict[str, LineValues] = {}
    for name, value in values.items():
        if (found := _WANDB.match(name)) and not name.endswith(("__MIN", "__MAX")):
            runs.setdefault(found["run"], {})[found["metric"]] = value
    for run, own in runs.items():
        if any(value is not None for value in own.values()):
            yield run, shared | own


def _is_header(cells: list[str], names: list[str], delimiter: str) -> bool:
    return bool(set(cells) & set(names) - {""}) and all(
        _value(cell, delimiter) is None or cell in names for cell in cells
    )


def _value(cell: str, delimiter: str) -> float | None:
    if delimiter != "," and _DECIMAL_COMMA.match(cell):
        cell = cell.replace(".", "").replace(",", ".")
    lower = cell.strip().lower()
    if lower in ("true", "false"):
        return float(lower == "true")
    return number(cell)


def _null(cell: str) -> bool:
    return cell.strip().lower() in NULLS


def _first_line(source: LogFile) -> str:
    lines: list[str] = []
    for line in _text(source):
        if line.strip():
            lines.append(line.rstrip("\r\n"))
        if len(lines) == 3:
            break
    if is_blank_table(lines) and not any(sign in lines[0] for sign in ",;\t"):
        return lines[0].lstrip("# \t")
    if len(lines) > 1 and lines[0].startswith("#") and is_commented_header(lines[0]):
        header = lines[0].lstrip("# \t")
        sign = delimiter_of(header)
        if lines[1].count(sign) == header.count(sign) and not lines[1].startswith("#"):
            return header
    for line in _text(source):
        if line.strip() and not line.lstrip().startswith("#") and not _HINT.match(line):
            return line.rstrip("\r\n")
    raise InputError(f"{source.name} is empty: a log needs a header and at least one row")


def _text(source: LogFile) -> Iterator[str]:
    for number_, chunk in enumerate(source.chunks()):
        yield from _decoded(chunk, first=not number_)


def _decoded(piece: bytes, *, first: bool) -> list[str]:
    piece = piece.removeprefix(b"\xef\xbb\xbf") if first else piece
    if b"\x1b" in piece:
        piece = without_colours(piece)
    return [
        line.decode("utf-8", errors="replace").replace("\0", "") for line in piece.splitlines(keepends=True)
    ]

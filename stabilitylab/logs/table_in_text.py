"""A table inside other text: a report in Markdown, rich's or tabulate's boxes, a notebook's output.

    We trained for a day.                 left out
    | step | loss |                       the header: words, a loss among them
    | ---: | ---: |                       rules
    | 1    | 2.31 |                       rows of as many cells, most of them numbers

Bars (also drawn ones), tabs, commas, semicolons or blanks separate cells; where names hold blanks and a rule of dashes below
separates the columns (spaCy, tabulate), their blanks become ``_``. From the header on, the table is read as a file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from stabilitylab.logs.pattern import number, without_colours
from stabilitylab.logs.source import LogFile

_DRAWN = str.maketrans(
    dict.fromkeys("│┃║", "|") | dict.fromkeys("─━═╌", "-") | dict.fromkeys("┼╇╪┿╂├┤┡┩╞╡┌┬┐└┴┘┏┳┓┗┻┛╭╮╰╯", "+")
)
_RULE = re.compile(r"^[\s|+:=-]*$")
_DASHES = re.compile(rb"\s*-+(?:[ \t]+-+)+[ \t\r]*\n")
_MARKS = re.compile(r"(?m:(?<=\d)[ \t]+(?:\*|←|✓|✔|★|<-)[^\d\r\n|]*(?=\r?$))".encode())  # 2.31 * best
_OVERWRITTEN = re.compile(rb"[^\n]*\r(?=[^\r\n])")
_ROWS = 3  # rows that confirm a header


@dataclass(frozen=True, slots=True)
class TableStart:
    """Where a table begins.

    Attributes:
        offset: the place of its header, in bytes of the decoded text.
        rows: number of rows below it, in the piece examined.
    """

    offset: int
    rows: int


def table_in(source: LogFile) -> TableStart | None:
    """The longest table in the first piece of the text."""
    chunk = next(source.chunks(), b"")
    best: TableStart | None = None
    small = chunk.lower()
    at = small.find(b"loss")
    while at >= 0:
        start, end = small.rfind(b"\n", 0, at) + 1, small.find(b"\n", at)
        end = len(chunk) if end < 0 else end
        line = chunk[start:end]
        sentence = b":" in line or b"=" in line  # no header, like most lines of a log
        if not sentence and _is_header(header := _joined(_plain(line), chunk, end)):
            rows = _rows(header, chunk, end)
            if rows >= _ROWS and (best is None or rows > best.rows):
                best = TableStart(start, rows)
        at = small.find(b"loss", end)
    return best


class ShownSource(LogFile):
    """A source whose lines are as a terminal shows them: what a bar wrote before a carriage return is overwritten."""

    def __init__(self, source: LogFile) -> None:
        super().__init__(source.path, source.name)
        self._inner = source

    def head(self, size: int = 1 << 16) -> bytes:
        """The first bytes."""
        return next(self.chunks(), b"")[:size]

    def chunks(self) -> Iterator[bytes]:
        """All bytes."""
        for chunk in self._inner.chunks():
            yield _OVERWRITTEN.sub(b"", chunk)


class TableSource(LogFile):
    """A source from a table's header on, with drawn lines as ASCII signs."""

    def __init__(self, source: LogFile, offset: int) -> None:
        super().__init__(source.path, source.name)
        self._inner, self._offset = source, offset

    def head(self, size: int = 1 << 16) -> bytes:
        """The first bytes."""
        return next(self.chunks(), b"")[:size]

    def chunks(self) -> Iterator[bytes]:
        """All bytes."""
        for number_, chunk in enumerate(self._inner.chunks()):
            if number_:
                yield _MARKS.sub(b"", _typed(chunk))
                continue
            header, end, rows = chunk[self._offset :].partition(b"\n")
            yield _joined(_plain(header), end + rows, 0).encode() + end + _MARKS.sub(b"", _typed(rows))


def _typed(text: bytes) -> bytes:
    text = without_colours(text) if b"\x1b" in text else text
    return text if text.isascii() else text.decode("utf-8", errors="replace").translate(_DRAWN).encode()


def _plain(line: bytes) -> str:
    return _typed(line).decode("utf-8", errors="replace")


def _joined(header: str, chunk: bytes, at: int) -> str:
    """The header, with each column's words as one where a rule below separates the columns."""
    below = _DASHES.match(chunk, at)
    header = header.lstrip("# \t")
    names = re.split(r"\s{2,}", header.strip())
    if len(header.split()) == len(names) or len(names) < 2:
        return header
    if below is None:  # no rule separates columns: the first row must hold as many numbers as names
        rows = (_unmarked(_plain(line)).split() for line in chunk[at : at + 4096].splitlines())
        row = next((row for row in rows if row and number(row[0]) is not None), [])
        if len(row) != len(names):
            return header
    elif len(below[0].split()) != len(names):
        return header
    return "  ".join(name.replace(" ", "_") for name in names)


def _unmarked(line: str) -> str:
    return _MARKS.sub(b"", line.encode()).decode()


def _cells(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        return line.split()
    text = line.strip().strip("|") if delimiter == "|" else line
    return [cell.strip() for cell in text.split(delimiter)]


def _delimiter(header: str) -> str:
    return (
        "|"
        if "|" in header
        else max(" ,;\t", key=lambda sign: (header.count(sign) > 0) * " ,;\t".index(sign))
    )


def _is_header(line: str) -> bool:
    cells = _cells(line, _delimiter(line))
    return (
        len(cells) > 1
        and not line.rstrip().endswith((".", ":"))
        and all(re.fullmatch(r"[A-Za-z#%_][\w ./@%()\[\]#-]*", cell) for cell in cells)
    )


def _rows(header: str, chunk: bytes, at: int) -> int:
    """The number of rows with as many cells that follow."""
    delimiter = _delimiter(header)
    width, rows = len(_cells(header, delimiter)), 0
    while at < len(chunk):
        end = chunk.find(b"\n", at + 1)
        end = len(chunk) if end < 0 else end
        line = _plain(chunk[at:end])
        at = end
        if not line.strip() or _RULE.match(line):
            continue
        cells = _cells(_unmarked(line), delimiter)
        numbers = sum(number(cell) is not None for cell in cells)
        if len(cells) != width or 2 * numbers < sum(cell != "" for cell in cells):
            break
        rows += numbers > 0
    return rows

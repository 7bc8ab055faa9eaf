"""Records printed as boxes, one name and one number per row: Stable-Baselines, Spinning Up, own scripts with tabulate.

    -----------------------------
    | train/          |         |        a heading: rows indented below it are train/...
    |    loss         | 20.1    |
    |    n_updates    | 18      |
    -----------------------------

A box is a record. It ends at a line that is neither row nor rule, or where a name comes again (rules between all rows do not
separate boxes). Sources: stable_baselines3/common/logger.py HumanOutputFormat (2.x), spinup/utils/logx.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from stabilitylab.logs.column_names import counter_of, is_loss
from stabilitylab.logs.pattern import LineValues, number, plain_text
from stabilitylab.logs.reading import Reading, Row, text_rows
from stabilitylab.logs.source import LogFile

_ROW = re.compile(r"^\s*[|│┃](\s*)([A-Za-z][^|│┃]*?)\s*[|│┃]\s*([^|│┃]*?)\s*[|│┃]\s*$")
# Ray: one cell, blanks before the number
_CELL = re.compile(r"^\s*[|│┃](\s*)([A-Za-z][\w./-]*)\s{2,}([^\s|│┃]+)\s*[|│┃]\s*$")
_RULE = re.compile(r"^\s*[-+=|─━═┌┬┐├┼┤└┴┘╭╮╰╯┏┳┓┗┻┛┡╇┩│]{5,}\s*$")
_BARS = (b"|", "│".encode(), "┃".encode())
_SEEK = re.compile(rb"[\r\n][ \t]*(?:\||\xe2\x94[\x82\x83])[^\r\n]*[lL][oO][sS][sS]")


def read_boxes(source: LogFile) -> Reading | None:
    """The boxes; None where fewer than two hold a loss."""
    reading = Reading(
        format="boxes",
        rows=lambda: text_rows(source, reading),
        pieces=BoxPieces,
        # For reinforcement learning, the policy's.
        losses=("train/loss", "loss", "LossPi"),
    )
    found = 0
    pieces = BoxPieces()
    for chunk in source.chunks():
        if not _SEEK.search(chunk):
            continue
        for _, values in pieces.take(chunk):
            found += any(is_loss(name) and value is not None for name, value in values.items())
            if found > 1:
                return reading
    found += sum(any(is_loss(name) for name in values) for _, values in pieces.end())
    return reading if found > 1 else None


class BoxPieces:
    """Takes boxes out of the text around them."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"held": {}, "heading": ""}

    def take(self, piece: bytes) -> Iterator[Row]:
        """The complete boxes."""
        if not self.state["held"] and not any(bar in piece for bar in _BARS):
            return
        for line in piece.splitlines():
            text = plain_text(line)
            row = _ROW.match(text) or _CELL.match(text)
            if row is None:
                if not _RULE.match(text):
                    yield from self.end()
                continue
            indent, name, cell = row.groups()
            if name.endswith("/") and not cell:
                self.state["heading"] = name
                continue
            heading = self.state["heading"] if len(indent) > 1 else ""
            value = number(cell)
            if value is None:
                continue
            if heading + name in self.state["held"]:
                yield from self.end()
                self.state["heading"] = heading
            self.state["held"][heading + name] = value

    def end(self) -> Iterator[Row]:
        """The last box."""
        held: LineValues = self.state["held"]
        self.state = {"held": {}, "heading": ""}
        if any(is_loss(name) or counter_of(name) for name in held):
            yield "", held

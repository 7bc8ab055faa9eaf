"""What a reader of records gives: rows, their format and columns, and counts of what it left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from stabilitylab.logs.source import LogFile

Row = tuple[str, Mapping[str, float | None]]
# Columns whose words tell training from validation.
MODES = ("mode", "split", "phase", "stage", "type", "event", "kind")


class LinePieces(Protocol):
    """Takes a text log in pieces that end with a line, in order: all of it at once, or as it grows.

    Attributes:
        state: what later pieces need from earlier ones, ready for JSON; may be set.
    """

    state: dict[str, Any]

    def take(self, piece: bytes) -> Iterator[Row]:
        """The rows of the next piece."""

    def end(self) -> Iterator[Row]:
        """The rows held back for lines that have not come."""


@dataclass(slots=True)
class Reading:
    """A reader set on a source.

    Attributes:
        format: the format recognised.
        rows: gives all rows at each call, and counts in ``left_out`` what it skips.
        step: the name of the column that counts steps, where the format knows it.
        losses: the format's names of its loss, best first.
        left_out: reason -> number of records.
        notes: sentences about the whole log.
        examples: the first damage found, as the end of a sentence that begins with the log's name; copies share it.
        pieces: makes a reader of pieces, for a text that may grow; None: the text can only be read as a whole.
    """

    format: str
    rows: Callable[[], Iterator[Row]]
    step: str | None = None
    losses: tuple[str, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    pieces: Callable[[], LinePieces] | None = None

    def damage(self, reason: str, example: str) -> None:
        """Count a record that cannot be read, and keep the first as the example."""
        self.left_out[f"damaged: {reason}"] += 1
        if not self.examples:
            self.examples.append(example)


def text_rows(source: LogFile, reading: Reading) -> Iterator[Row]:
    """All rows of a text read in pieces."""
    assert reading.pieces is not None
    reading.left_out.clear()
    pieces = reading.pieces()
    for chunk in source.chunks():
        yield from pieces.take(chunk)
    yield from pieces.end()

"""Lines that a launcher labels with the rank that printed them: ``srun --label``, ``mpirun --tag-output``.

    0: step 1 loss 2.31             Slurm
    [1,0]<stdout>: step 1 loss 2.31  Open MPI

The reader takes the label off and reads each rank's lines as a file of their own. It believes labels where nearly every line at the
start has one and they come again: a number that opens a line may also be its step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from stabilitylab.logs.reading import LinePieces, Row
from stabilitylab.logs.source import LogFile

_LABEL = re.compile(rb"^(?:\s*(\d{1,5}): |\[\d+,(\d+)\]<std(?:out|err)>: ?)")
_FEWEST = 8
_SHARE = 0.9


def is_labelled(head: bytes) -> bool:
    """Whether a launcher's labels open the lines."""
    lines = [line for line in head.splitlines() if line.strip()]
    labels = Counter(found[1] or found[2] for line in lines if (found := _LABEL.match(line)))
    count = sum(labels.values())
    return (
        count >= _FEWEST
        and count >= _SHARE * len(lines)
        and count >= 2 * len(labels)
        and min(int(label) for label in labels) <= 1
    )


def by_label(piece: bytes) -> dict[str, bytes]:
    """The lines of each rank, without their labels; those without one belong to no rank."""
    out: dict[str, list[bytes]] = {}
    for line in piece.splitlines(keepends=True):
        found = _LABEL.match(line)
        rank = "" if found is None else (found[1] or found[2]).decode().lstrip("0") or "0"
        out.setdefault(rank, []).append(line[found.end() :] if found else line)
    return {rank: b"".join(lines) for rank, lines in out.items()}


class UnlabelledSource(LogFile):
    """A source without its labels, by which to recognise its format."""

    def head(self, size: int = 1 << 16) -> bytes:
        """The first bytes, ranks one after the other."""
        return b"".join(by_label(super().head(size)).values())

    def chunks(self) -> Iterator[bytes]:
        """All bytes, the lines of a rank together."""
        for chunk in super().chunks():
            yield b"".join(by_label(chunk).values())


class LabelledPieces:
    """Keeps a reader of pieces for each rank.

    Args:
        make: makes a reader.
    """

    def __init__(self, make: Callable[[], LinePieces]) -> None:
        self._make = make
        self._ranks: dict[str, LinePieces] = {}

    @property
    def state(self) -> dict[str, Any]:
        """The state of each rank's reader."""
        return {rank: pieces.state for rank, pieces in self._ranks.items()}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        for rank, held in state.items():
            self._of(rank).state = held

    def take(self, piece: bytes) -> Iterator[Row]:
        """The rows of these lines."""
        for rank, lines in by_label(piece).items():
            yield from _named(rank, self._of(rank).take(lines))

    def end(self) -> Iterator[Row]:
        """The rows held back."""
        for rank, pieces in self._ranks.items():
            yield from _named(rank, pieces.end())

    def _of(self, rank: str) -> LinePieces:
        if rank not in self._ranks:
            self._ranks[rank] = self._make()
        return self._ranks[rank]


def _named(rank: str, rows: Iterator[Row]) -> Iterator[Row]:
    for part, values in rows:
        yield part or (f"rank {rank}" if rank else ""), values

"""Lines that a launcher labels with the rank that printed them: ``srun --label``, ``mpirun --tag-output``.

    0: step 1 loss 2.31             Slurm
    [1,0]<stdout>: step 1 loss 2.31  Open MPI
    [pod/trainer-0/main] step 1      kubectl logs --prefix
    trainer-0  | step 1              Docker Compose
    node01: step 1                   pdsh

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

_LABEL = re.compile(
    rb"^(?:\s*(\d{1,5}): |\[\d+,(\d+)\]<std(?:out|err)>: ?|\[pod/([^\]\s]+)\] "
    rb"|(?!(?i:epoch|step|iter|batch|round|phase|stage|fold))([A-Za-z][\w.-]*[-_]\d+) +\| "
    rb"|((?:node|host|worker|trainer|nid|ip)[\w.-]*\d[\w.-]*): )"
)
_RANK = re.compile(
    r"^\[(?:rank|default)\s?(\d+)\]:|^\(\w+ pid=(\d+)"  # torchrun, Ray
    r"|(?:\b|(?<=local_)|(?<=global_))rank[=: _]{0,2}(\d+)(?:/\d+)?(?=[\]):,| >]|$)"
    r"|[\[(](?:gpu|cuda|device|worker|process|proc|r)[ :=#]?(\d{1,3})(?:/\d+)?[\])]"  # [GPU0]
    r"|^(?:process |cuda:)(\d{1,3})(?=:| \|)"
    r"|\((\d+)/\d+\) Epoch \d+, batch \d+,",  # icefall
    re.IGNORECASE,
)
_RANK_WORD = re.compile(r"[rR](?:ank|ANK)|^[\[(pPcC]|[\[(](?:[GCDWPRgcdwpr]\w*[ :=#]?)?\d+(?:/\d+)?[\])]")
_FEWEST = 8
_SHARE = 0.9


def rank_in(line: str) -> str:
    """The part that a line's own words name: "rank 3", or Ray's process; "" where they name none."""
    if not _RANK_WORD.search(line) or (rank := _RANK.search(line)) is None:
        return ""
    return f"process {rank[2]}" if rank[2] else f"rank {next(filter(None, rank.groups()))}"


def is_labelled(head: bytes) -> bool:
    """Whether a launcher's labels open the lines."""
    lines = [line for line in head.splitlines() if line.strip()]
    labels = Counter(_said(found) for line in lines if (found := _LABEL.match(line)))
    count = sum(labels.values())
    return (
        count >= _FEWEST
        and count >= _SHARE * len(lines)
        and count >= 2 * len(labels)
        and min(int(label) if label.isdigit() else 0 for label in labels) <= 1
    )


def _said(label: re.Match[bytes]) -> str:
    """The rank or the name in a label."""
    said = next(group for group in label.groups() if group is not None).decode("utf-8", "replace")
    return (said.lstrip("0") or "0") if said.isdigit() else said


def by_label(piece: bytes) -> dict[str, bytes]:
    """The lines of each rank, without their labels; those without one belong to no rank."""
    out: dict[str, list[bytes]] = {}
    for line in piece.splitlines(keepends=True):
        found = _LABEL.match(line)
        rank = "" if found is None else _said(found)
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
        yield part or (f"rank {rank}" if rank.isdigit() else rank), values

"""Reads a growing file in pieces of whole lines, and notices what becomes of it.

    grows                               reads only the new bytes
    another file has its name (rotated) reads the rest of the old one first, then the new one from its start
    shorter than what was read,
    or other bytes where reading ended  cut or rewritten: reads from the start

The tail keeps the offset where reading ended, and the last bytes before it (the mark). A file that holds the mark at that place
counts as the same, so the tail finds it again after a restart, also under another name beside it (``log.1``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PIECE = 4 << 20
MARK = 64
LONGEST_LINE = 16 << 20


class Tail:
    """Reads on where it stopped.

    Args:
        path: the file; need not exist yet.
        state: of an earlier tail.
    """

    def __init__(self, path: Path, state: dict[str, Any] | None = None) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self.offset: int = state["offset"] if state else 0
        self._mark: bytes = bytes.fromhex(state["mark"]) if state else b""
        self._inode: int | None = state["inode"] if state else None

    @property
    def state(self) -> dict[str, Any]:
        """Where it stands."""
        return {"offset": self.offset, "mark": self._mark.hex(), "inode": self._inode}

    def read(self, *, unfinished: bool = False) -> Iterator[bytes | str]:
        """The new pieces, each ending with a line; "rotated" or "truncated" where the file begins again.

        Args:
            unfinished: whether to give a last line without its end, too.
        """
        try:
            yield from self._read(unfinished)
        except OSError:  # gone, or a stale handle of a network file: open it again next time
            self.close()

    def close(self) -> None:
        """Close the file; reading continues where it stopped."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _read(self, unfinished: bool) -> Iterator[bytes | str]:
        if self._file is None:
            if not self.path.exists() and not self.offset:
                return
            turn = self._open()
            if turn is not None:
                yield turn
        for _ in range(8):  # as many rotations may have happened at once
            assert self._file is not None
            yield from self._grown(unfinished)
            now = self._stat()
            if now is None:
                return
            if now.st_ino != self._inode:
                # Nobody writes to the old file any more: its last line is complete.
                yield from self._grown(True)
                self._begin(self.path.open("rb"))
                yield "rotated"
            elif now.st_size < self.offset or not self._is_the_same(self._file):
                self._begin(self._file)
                yield "truncated"
            else:
                return

    def _open(self) -> str | None:
        inode = self._inode
        if self.path.exists():
            file = self.path.open("rb")
            if not self.offset or self._is_the_same(file):
                self._file, self._inode = file, os.fstat(file.fileno()).st_ino
                return None
            same_file = os.fstat(file.fileno()).st_ino == inode
            file.close()
            if same_file:
                self._begin(self.path.open("rb"))
                return "truncated"
        for sibling in sorted(self.path.parent.iterdir()):
            if not sibling.name.startswith(self.path.name) or sibling == self.path or not sibling.is_file():
                continue
            if sibling.stat().st_size >= self.offset:
                old = sibling.open("rb")
                if self._is_the_same(old):
                    self._file, self._inode = old, os.fstat(old.fileno()).st_ino
                    return None  # the rest of it, and then the new one
                old.close()
        self._begin(self.path.open("rb"))
        return "truncated"

    def _begin(self, file: BinaryIO) -> None:
        if file is not self._file:
            self.close()
        self._file, self.offset, self._mark = file, 0, b""
        self._inode = os.fstat(file.fileno()).st_ino

    def _stat(self) -> os.stat_result | None:
        try:
            return self.path.stat()
        except OSError:
            return None

    def _is_the_same(self, file: BinaryIO) -> bool:
        file.seek(self.offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def _grown(self, unfinished: bool) -> Iterator[bytes]:
        file = self._file
        assert file is not None
        if os.fstat(file.fileno()).st_size <= self.offset or not self._is_the_same(file):
            return
        rest = b""
        while piece := file.read(PIECE):
            piece = rest + piece
            end = max(piece.rfind(b"\n"), piece.rfind(b"\r")) + 1
            end = end or (len(piece) if len(piece) > LONGEST_LINE else 0)
            rest = piece[end:]
            if end:
                self._advance(piece[:end])
                yield piece[:end]
        if rest and unfinished:
            self._advance(rest)
            yield rest

    def _advance(self, piece: bytes) -> None:
        self.offset += len(piece)
        self._mark = (self._mark + piece[-MARK:])[-MARK:]

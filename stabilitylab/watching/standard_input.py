"""``watch -``: follows what another program prints, while it prints.

It copies standard input line by line into a temporary file, and watches that. A pipe cannot be read again, so such a watch keeps no
state.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Piped:
    """Standard input as a file that grows.

    Attributes:
        file: holds the input so far.
        state: a folder for the watch's state.
        ended: set when the input has ended.
    """

    file: Path
    state: Path
    ended: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def piped() -> Iterator[Piped]:
    """Copy standard input from a thread of its own."""
    with tempfile.TemporaryDirectory(prefix="stabilitylab-") as folder:
        pipe = Piped(Path(folder) / "standard-input", Path(folder) / "state")
        pipe.file.touch()
        threading.Thread(target=_copy, args=(pipe,), daemon=True).start()
        yield pipe


def _copy(pipe: Piped) -> None:
    with contextlib.suppress(OSError, ValueError), pipe.file.open("ab", buffering=0) as copy:
        source = sys.stdin.buffer
        while piece := source.read1(_PIECE) if hasattr(source, "read1") else source.read(_PIECE):
            copy.write(piece)
    pipe.ended.set()

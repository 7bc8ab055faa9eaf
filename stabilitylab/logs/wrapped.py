"""Lines of text inside JSON, one object a line, as containers and log services keep what a program printed.

    {"log": "step 1 loss 2.3\\n", "stream": "stdout", "time": ...}     Docker's json-file driver
    {"textPayload": "step 1 loss 2.3", "timestamp": ...}              Google Cloud Logging
    {"message": "step 1 loss 2.3", "levelname": "INFO", ...}          python-json-logger, Fluent Bit, CloudWatch

The text is taken out, and read as if it had been a file of its own. What follows the objects (a last one cut short) is no line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from stabilitylab.logs.json_lines import numbers
from stabilitylab.logs.rows import Pieces, Row
from stabilitylab.logs.source import Source

KEYS = ("log", "message", "msg", "textPayload", "MESSAGE", "event")
_LOOKED_AT = 50


def key_of(head: bytes) -> str | None:
    """Under which name the objects hold a line of text; None: they are records themselves."""
    found: str | None = None
    for line in head.splitlines()[:_LOOKED_AT]:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or any("loss" in name.lower() for name in numbers(record)):
            return None
        found = found or next((key for key in KEYS if isinstance(record.get(key), str)), None)
    return found


def unwrapped(piece: bytes, key: str) -> bytes:
    """The lines that these objects hold."""
    out: list[str] = []
    for line in piece.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        text = record.get(key) if isinstance(record, dict) else None
        if isinstance(text, str):
            # Docker keeps the line's end, and leaves it out where it has cut a long line in two.
            out.append(text if key == "log" or text.endswith("\n") else f"{text}\n")
    return "".join(out).encode()


class UnwrappedSource(Source):
    """A source as the program wrote it, before it was put into JSON."""

    def __init__(self, source: Source, key: str) -> None:
        super().__init__(source.path, source.name)
        self.key = key

    def head(self, size: int = 1 << 16) -> bytes:
        """The first bytes."""
        return unwrapped(super().head(size).rpartition(b"\n")[0], self.key)

    def chunks(self) -> Iterator[bytes]:
        """All bytes, in pieces that end with a line."""
        for chunk in super().chunks():
            yield unwrapped(chunk, self.key)


class UnwrappingPieces:
    """A reader of pieces behind its JSON."""

    def __init__(self, inner: Pieces, key: str) -> None:
        self._inner, self._key = inner, key

    @property
    def state(self) -> dict[str, Any]:
        """The reader's own."""
        return self._inner.state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._inner.state = state

    def take(self, piece: bytes) -> Iterator[Row]:
        """The rows of these objects."""
        return self._inner.take(unwrapped(piece, self._key))

    def end(self) -> Iterator[Row]:
        """What was held back."""
        return self._inner.end()

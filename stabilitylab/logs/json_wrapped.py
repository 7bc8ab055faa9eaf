"""Lines of text inside JSON, one object per line, as containers and log services keep a program's output.

    {"log": "step 1 loss 2.3\\n", "stream": "stdout", "time": ...}     Docker's json-file driver
    {"textPayload": "step 1 loss 2.3", "timestamp": ...}              Google Cloud Logging
    {"message": "step 1 loss 2.3", "levelname": "INFO", ...}          python-json-logger, Fluent Bit, CloudWatch

    {"events": [{"timestamp": ..., "message": "step 1 loss 2.3"}, ...]}   one document: CloudWatch, Kibana, Loki

The reader takes the text out and reads it as a file of its own. Anything after the objects (a last one cut short) is no line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from stabilitylab.logs.json_lines import numbers
from stabilitylab.logs.reading import LinePieces, Row
from stabilitylab.logs.source import LogFile

KEYS = ("log", "message", "msg", "textPayload", "MESSAGE", "event")
_LOOKED_AT = 50


def key_of(head: bytes) -> str | None:
    """The key under which the objects hold a line of text; None: they are records themselves."""
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
            out.append(text)
    # Docker keeps the line's end, except where it has cut a long line in two.
    keeps = key == "log" and any(text.endswith("\n") for text in out)
    return "".join(text if keeps or text.endswith("\n") else f"{text}\n" for text in out).encode()


class UnwrappedSource(LogFile):
    """A source as the program wrote it, without the JSON around it."""

    def __init__(self, source: LogFile, key: str) -> None:
        super().__init__(source.path, source.name)
        self.key = key

    def head(self, size: int = 1 << 16) -> bytes:
        """The first bytes."""
        return unwrapped(super().head(size).rpartition(b"\n")[0], self.key)

    def chunks(self) -> Iterator[bytes]:
        """All bytes, in pieces that end with a line."""
        for chunk in super().chunks():
            yield unwrapped(chunk, self.key)


class DocumentSource(LogFile):
    """The lines that one JSON document holds in a list of objects, oldest first as they stand."""

    def __init__(self, source: LogFile, lines: bytes) -> None:
        super().__init__(source.path, source.name)
        self._lines = lines

    @classmethod
    def of(cls, source: LogFile) -> DocumentSource | None:
        """The document's lines; None: its objects are records themselves, or there are none."""
        try:
            document = json.loads(b"".join(source.chunks()))
        except (ValueError, RecursionError):
            return None
        lines = _lines_of(document)
        return None if lines is None else cls(source, lines)

    def head(self, size: int = 1 << 16) -> bytes:
        """The first bytes."""
        return self._lines[:size]

    def chunks(self) -> Iterator[bytes]:
        """All of them."""
        yield self._lines


def _pairs_of(values: Any) -> list[tuple[str, str]]:
    if not isinstance(values, list):
        return []
    return [
        (one[0], one[1])
        for one in values
        if isinstance(one, list) and len(one) == 2 and all(isinstance(x, str) for x in one)
    ]


def _lines_of(document: Any, depth: int = 0) -> bytes | None:
    if isinstance(document, dict) and depth < 4:
        return next((found for held in document.values() if (found := _lines_of(held, depth + 1))), None)
    if not isinstance(document, list) or not document or depth > 4:
        return None
    objects = [one for one in document if isinstance(one, dict)]
    if streams := [
        pair for one in objects for pair in _pairs_of(one.get("values"))
    ]:  # Loki, a time beside each
        return "".join(f"{line}\n" for _, line in sorted(streams)).encode()
    objects = [one["_source"] if isinstance(one.get("_source"), dict) else one for one in objects]
    if not objects or any("loss" in name.lower() for one in objects[:_LOOKED_AT] for name in numbers(one)):
        return None
    key = next(
        (k for k in KEYS if sum(isinstance(one.get(k), str) for one in objects) * 2 > len(objects)), None
    )
    if key is None:
        return None
    lines = [one[key].rstrip("\n") + "\n" for one in objects if isinstance(one.get(key), str)]
    return "".join(lines).encode()


class UnwrappingPieces:
    """Takes the JSON off pieces for a reader."""

    def __init__(self, inner: LinePieces, key: str) -> None:
        self._inner, self._key = inner, key

    @property
    def state(self) -> dict[str, Any]:
        """The reader's state."""
        return self._inner.state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._inner.state = state

    def take(self, piece: bytes) -> Iterator[Row]:
        """The rows of these objects."""
        return self._inner.take(unwrapped(piece, self._key))

    def end(self) -> Iterator[Row]:
        """The rows held back."""
        return self._inner.end()

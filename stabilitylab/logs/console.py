"""Text logs: what trainers print, found between whatever else is printed.

The formats are a table (``console_formats``). The one whose records come first in a file is the file's; from then on only
its trigger is looked for, in megabytes at once, so that a line in thousands costs little. Where no format of a known
trainer occurs, lines with a step and a loss in them are taken (``any trainer``).

Which rank printed a line is told by its prefix: ``[rank3]:``, ``[default7]:``, ``rank=3``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from stabilitylab.errors import InputError
from stabilitylab.logs.console_formats import FALLBACK, FORMATS
from stabilitylab.logs.pattern import TextFormat, Values, own_formats, pairs, plain_text
from stabilitylab.logs.rows import Reading, Row
from stabilitylab.logs.source import Source

_RANK = re.compile(r"^\[(?:rank|default)\s?(\d+)\]:|\brank[= ](\d+)[\]: ]", re.IGNORECASE)
_FOLLOWS = re.compile(r"^\s+[A-Za-z]")
_LINE_END = re.compile(rb"[\r\n]")
# A format is the file's when so many of its lines are records.
_ENOUGH = 3


def read_console(source: Source, *, pattern: str | None = None) -> Reading | None:
    """The file as a text log; None: no format's records are in it.

    Raises:
        InputError: the pattern that was given matches no line.
    """
    if pattern is not None:
        for own in own_formats(pattern):
            if _first(source, [own], enough=1):
                return _reading(source, own)
        raise InputError(f"{source.name} holds no line that --pattern {pattern!r} matches")
    found = _first(source, FORMATS, enough=_ENOUGH) or _first(source, [FALLBACK], enough=1)
    return None if found is None else _reading(source, found)


def _first(source: Source, formats: Sequence[TextFormat], *, enough: int) -> TextFormat | None:
    """The format with the most records in the first piece of the file that holds enough of one; or the best of all."""
    total = [0] * len(formats)
    for chunk in source.chunks():
        for i, one in enumerate(formats):
            for count, _ in enumerate(_records(one, chunk, {}), start=1):
                total[i] += 1
                if count == 200:
                    break
        if max(total) >= enough:
            break
    return formats[total.index(max(total))] if any(total) else None


def _reading(source: Source, one: TextFormat) -> Reading:
    left_out: Counter[str] = Counter()

    def rows() -> Iterator[Row]:
        left_out.clear()
        before: dict[str, Values] = {}
        held: tuple[str, Values] | None = None
        for chunk in source.chunks():
            for rank, values in _records(one, chunk, before):
                if values is None:
                    left_out["lines of validation, of the start, or without a loss"] += 1
                    continue
                if held is not None:
                    yield held
                held = rank, values
        if held is not None:
            yield held

    return Reading(format=one.name, rows=rows, losses=one.losses, left_out=left_out)


def _records(one: TextFormat, chunk: bytes, before: dict[str, Values]) -> Iterator[tuple[str, Values | None]]:
    """Records of the lines of ``chunk``; None in place of one that the format leaves out."""
    at = 0
    search = one.trigger.search
    while found := search(chunk, at):
        start = max(chunk.rfind(b"\n", 0, found.start()), chunk.rfind(b"\r", 0, found.start())) + 1
        ending = _LINE_END.search(chunk, found.start())
        end = ending.start() if ending else len(chunk)
        at = end + 1
        line = plain_text(chunk[start:end])
        values = one.read(line)
        if values is None:
            continue
        if one.follow:
            at = _follow(chunk, at, values)
        rank = _RANK.search(line)
        part = f"rank {rank[1] or rank[2]}" if rank else ""
        if one.finish is not None:
            done = one.finish(values, before.get(part, {}))
            before[part] = values
            values = done
        yield part, values


def _follow(chunk: bytes, at: int, values: Values) -> int:
    """Take the indented lines from ``at`` on into ``values``; returns where they end."""
    while at < len(chunk):
        end = chunk.find(b"\n", at)
        end = len(chunk) if end < 0 else end
        line = plain_text(chunk[at:end])
        if not _FOLLOWS.match(line):
            break
        for name, value in pairs(line).items():
            values.setdefault(name, value)
        at = end + 1
    return at

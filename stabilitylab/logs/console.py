"""Text logs: finds what trainers print among other output.

The formats are a table (``console_formats``). A file has the format whose records come first in it; from then on the reader
searches only for its trigger, megabytes at a time, so that a record among thousands of lines costs little. Where no known trainer's
format occurs, it takes lines with a step and a loss (``any trainer``).

A line's prefix tells the rank that printed it: ``[rank3]:``, ``[default7]:``, ``rank=3``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import counter_of, is_loss
from stabilitylab.logs.console_formats import FORMATS
from stabilitylab.logs.free_text import (
    ANY_LINE,
    ANY_TEXT,
    HEADING,
    MAY_HEAD,
    RIGHT_ABOVE,
    LogSigns,
    prepared,
    prepared_english,
)
from stabilitylab.logs.languages import is_foreign
from stabilitylab.logs.line_templates import Plans, ReadLine
from stabilitylab.logs.pattern import LineValues, TextFormat, next_place, own_formats, pairs, plain_text
from stabilitylab.logs.rank_labels import rank_in
from stabilitylab.logs.reading import Reading, Row, text_rows
from stabilitylab.logs.segment_columns import STEP_ABOVE
from stabilitylab.logs.source import LogFile

_FOLLOWS = re.compile(r"^\s+(?:\| > )?['\"]?[A-Za-z]")
# tqdm's and ignite's bars: [00:12<01:30; without a length [00:12, 1.2it/s
_DRAWN = re.compile(r"\[\d+:\d\d(?::\d\d)?(?:<|, +[\d.?]+(?:it/s|s/it))")
BAR = "\0bar"  # of a record that a bar shows; no number of the log
_TOLD = "\0told"  # the losses that already have the step above
_TRAINS = "\0trains"  # whether a heading of training has come
_ANNOUNCED = "\0announced"  # whether the heading above is "Evaluating..."
_HEADED = "\0headed"  # whether a heading of validation stands above
_SIGNALS = {
    "epoch": re.compile(r"^epochs?$"),
    "rate": re.compile(r"^(?:lr|learning[ _]rate)$"),
    "norm": re.compile(r"grad.*norm|gnorm|^norm$"),
}
_NO_STEPS = frozenset({"epoch", _TOLD, _HEADED, _TRAINS, _ANNOUNCED})
_BACK = re.compile(rb"\x08+")
_LINE_END = re.compile(rb"[\r\n]")
_ABOVE = 2048  # bytes before a record that are searched for a counter
# Pieces that may come before the first record of a known trainer, if some line names a loss meanwhile.
_PREFACE = 4
# A file has a format when this many of its lines are records.
_ENOUGH = 3
# A trigger that hits so often without a record is a word of another format.
_HITS = 4_000


def read_console(source: LogFile, *, pattern: str | None = None) -> Reading | None:
    """The file as a text log; None where it holds no format's records.

    Raises:
        InputError: the given pattern matches no line.
    """
    if pattern is not None:
        for own in own_formats(pattern):
            if _first(source, [own], enough=1):
                return _reading(source, own)
        raise InputError(f"{source.name} holds no line that --pattern {pattern!r} matches")
    found = _first(source, FORMATS, enough=_ENOUGH) or _any_text(source)
    return None if found is None else _reading(source, found)


def _any_text(source: LogFile, most: int | None = None) -> TextFormat | None:
    """Any trainer's lines, where there are some; without those of validation, if there are others."""
    evidence = LogSigns()
    seen = 0
    prepare = prepared_english if is_foreign(source.head().decode("utf-8", errors="replace")) else prepared
    any_text = replace(ANY_TEXT, prepare=prepare)
    for chunk in islice(source.chunks(), most):
        for _, values in _records(any_text, chunk, {}):
            if values is None:
                seen += 1
            elif evidence.suffices(values):
                return any_text
    if most is not None:
        return None
    if seen >= LogSigns.LINES or (seen and not evidence.lines):
        return replace(ANY_LINE, prepare=prepare)
    return None


def _first(source: LogFile, formats: Sequence[TextFormat], *, enough: int) -> TextFormat | None:
    """The format with the most records in the first piece of the file that holds enough of one; else the best of all pieces."""
    total = [0] * len(formats)
    others: list[TextFormat] = []  # formats whose trigger is a word of another format
    for count, chunk in enumerate(source.chunks()):
        for i, one in enumerate(formats):
            if total[i] == 0 and one in others:
                continue
            found = islice(_records(one, chunk, {}, hits=_HITS, spent=others), 200)
            total[i] += sum(enough == 1 or values is None or _has_loss(one, values) for _, values in found)
        if max(total) >= enough:
            best = formats[total.index(max(total))]
            return (best.loose and _says_more(chunk, best) and _any_text(source)) or best
        if count == _PREFACE and enough > 1 and _any_text(source, _PREFACE):
            break
    best = formats[total.index(max(total))]
    return best if max(total) >= min(best.least, enough) else None


def _says_more(chunk: bytes, one: TextFormat) -> bool:
    """Whether the same lines hold an epoch, a rate or a norm that the format does not read."""
    return bool(_kinds(chunk, ANY_TEXT) - _kinds(chunk, one))


def _kinds(chunk: bytes, one: TextFormat) -> set[str]:
    records = islice(_records(one, chunk, {}), 20)
    names = {name.lower() for _, values in records for name in values or ()}
    return {kind for kind, seek in _SIGNALS.items() if any(seek.search(name) for name in names)}


def _has_loss(one: TextFormat, values: LineValues) -> bool:
    return any(is_loss(name) or name in one.losses for name in values)


def _reading(source: LogFile, one: TextFormat) -> Reading:
    reading = Reading(
        format=one.name,
        rows=lambda: text_rows(source, reading),
        losses=one.losses,
        pieces=lambda: ConsolePieces(one, reading),
    )
    return reading


class ConsolePieces:
    """Reads records of one format.

    Args:
        one: the format.
        reading: counts what is left out.
    """

    def __init__(self, one: TextFormat, reading: Reading) -> None:
        self._one, self._reading, self._step = one, reading, ""
        self._read = Plans(_reader(one)).read if one.steady else _reader(one)
        # rank -> its record before; the start of a record whose further lines may come with the next piece; rank -> the last record
        # given out
        # "bars": rank -> the last state of a bar, which the next may draw anew; "anew": rank -> whether bars do
        self.state: dict[str, Any] = {"before": {}, "rest": "", "last": {}, "above": {}}
        self.state |= {"bars": {}, "anew": {}}

    def take(self, piece: bytes) -> Iterator[Row]:
        """The complete records."""
        if self._one.follow:
            piece = self.state["rest"].encode("utf-8", "surrogateescape") + piece
            cut = _unfinished(self._one, piece)
            self.state["rest"] = piece[cut:].decode("utf-8", "surrogateescape")
            piece = piece[:cut]
        return self._rows(piece)

    def end(self) -> Iterator[Row]:
        """The last record of several lines."""
        rest, self.state["rest"] = self.state["rest"], ""
        yield from self._rows(rest.encode("utf-8", "surrogateescape"))
        for rank in [*self.state.get("bars", ())]:  # a watch kept by an earlier version has none
            yield from self._bar_ends(rank)

    def _rows(self, piece: bytes) -> Iterator[Row]:
        state = self.state
        records = _records(self._one, piece, state["before"], above=state["above"], read=self._read)
        for rank, values in records:
            if values is None:
                self._reading.left_out["lines of validation, of the start, or without a loss"] += 1
            elif values.pop(BAR, None) is not None:
                yield from self._of_bar(rank, values)
            else:
                yield from self._bar_ends(rank)
                if self._is_repeated(rank, values):
                    self._reading.left_out["records printed twice"] += 1
                else:
                    yield rank, values

    def _of_bar(self, rank: str, values: LineValues) -> Iterator[Row]:
        """The record of a bar's last state at a step. tqdm draws a step first with the numbers of the one before."""
        held = self.state.setdefault("bars", {}).get(rank)
        if held is not None and "step" in values and held.get("step") == values["step"]:
            anew = self.state.setdefault("anew", {})
            anew[rank] = anew.get(rank, False) or repr(held) != repr(values)
            self._reading.left_out["states of a redrawn bar"] += 1
        else:
            yield from self._bar_ends(rank, values)
        self.state["bars"][rank] = values

    def _bar_ends(self, rank: str, then: LineValues | None = None) -> Iterator[Row]:
        """The record held back, unless a full bar only repeats the one before."""
        held = self.state.get("bars", {}).pop(rank, None)
        if held is None:
            return
        last = self.state["last"].get(rank)
        self.state["last"][rank] = held
        goes_on = then is not None and (then.get("step") or 0.0) > (held.get("step") or 0.0)
        if not goes_on and self.state.get("anew", {}).get(rank) and last is not None and _is_same(held, last):
            self._reading.left_out["states of a redrawn bar"] += 1
            self.state["last"][rank] = last
        else:
            yield rank, held

    def _is_repeated(self, rank: str, values: LineValues) -> bool:
        """Whether two loggers printed one record: the same numbers at the same step, one after the other."""
        last = self.state["last"].get(rank)
        self.state["last"][rank] = values
        if last is None or len(last) != len(values):
            return False
        if self._step not in values:
            self._step = next((name for name in values if counter_of(name) and name != "epoch"), "")
        step = self._step
        return step in values and last.get(step) == values[step] and repr(last) == repr(values)


def _is_same(a: LineValues, b: LineValues) -> bool:
    """Whether two states of a bar differ in nothing but the step."""
    one, other = (
        [item for item in values.items() if item[0] != "step" and item[0][0] != "/"] for values in (a, b)
    )
    return repr(one) == repr(other)


def _unfinished(one: TextFormat, piece: bytes) -> int:
    """Where the last record begins, if more of its lines may follow; else the piece's length."""
    start = -1
    for found in one.trigger.finditer(piece):
        start = found.start()
    if start < 0:
        return len(piece)
    begins = max(piece.rfind(end, 0, start) for end in (b"\n", b"\r")) + 1
    at = piece.find(b"\n", start) + 1
    while at and at < len(piece):
        if not _FOLLOWS.match(plain_text(piece[at:])):
            return len(piece)
        at = piece.find(b"\n", at) + 1
    return begins


def _records(
    one: TextFormat,
    chunk: bytes,
    before: dict[str, LineValues],
    *,
    hits: int | None = None,
    spent: list[TextFormat] | None = None,
    above: dict[str, Any] | None = None,
    read: Callable[[str], ReadLine] | None = None,
) -> Iterator[tuple[str, LineValues | None]]:
    """Rank and record of each matching line of ``chunk``; None in place of a record that the format leaves out. After ``hits`` hits
    of the trigger it stops, and adds the format to ``spent``. ``above``: what the lines between records have counted. ``read``:
    reads a line, where the format itself does not."""
    read = read or _reader(one)
    if b"\b" in chunk:  # Keras goes back over its bar with backspaces
        chunk = _BACK.sub(b"\n", chunk)
    if one.prepare is not None:
        chunk = one.prepare(chunk)
    at = count = looked = 0
    above = {} if above is None else above
    next_hit = _hits(one, chunk)
    returns = b"\r" in chunk
    while (count := count + 1) != hits and (hit := next_hit(at)) >= 0:
        # Go back to the line's start, but no further than the last record: look at every byte once.
        start = chunk.rfind(b"\n", at, hit) + 1
        if returns:
            start = max(start, chunk.rfind(b"\r", at, hit) + 1)
            ending = _LINE_END.search(chunk, hit)
            end = ending.start() if ending else len(chunk)
        else:
            end = chunk.find(b"\n", hit)
            end = end if end >= 0 else len(chunk)
        start = start or at
        if one.words and not one.trigger.match(chunk, hit, end) and not one.trigger.search(chunk, start, end):
            at = end + 1
            continue
        at = end + 1
        line = plain_text(chunk[start:end])
        values, part = read(line)
        if one.above is not None:
            if start - looked > 1:
                _look_above(one.above, chunk, max(looked, start - _ABOVE), start, above)
            looked = end
            headed = above.get(_HEADED)
            if headed and values == {}:  # what the heading announced has come
                above[_ANNOUNCED] = not above.get(_TRAINS)
            if values and headed and _goes_on(values, before.get(part, {}), above.get(_ANNOUNCED, False)):
                above[_HEADED] = False
            elif values and headed and _is_below(headed, values):
                if not any(counter_of(name) for name in values):  # what the heading announced has come
                    above[_HEADED], above[_ANNOUNCED] = 1, not above.get(_TRAINS)
                values = {}
        if values is None:
            continue
        if one.above is not None and values:
            _from_above(values, above)
        if one.follow:
            at = _follow(chunk, at, values)
        if not values:  # a line of validation
            yield part, None
            continue
        if one.finish is not None:
            done = one.finish(values, before.get(part, {}))
            before[part] = values
            values = done
            if values and ("<" in line or "it/s" in line) and _DRAWN.search(line):
                values[BAR] = 1.0
        yield part, values
    if count == hits and spent is not None:
        spent.append(one)
    if one.above is not None:  # lines below the last record are above the next piece's first
        _look_above(one.above, chunk, max(looked, len(chunk) - _ABOVE), len(chunk), above)


def _reader(one: TextFormat) -> Callable[[str], ReadLine]:
    """A function that reads a line and the rank that printed it."""

    def read(line: str) -> ReadLine:
        values = one.read(line)
        return values, "" if one.one_part or values is None else rank_in(line)

    return read


def _look_above(seek: re.Pattern[bytes], chunk: bytes, start: int, end: int, above: dict[str, Any]) -> None:
    for counter, said in seek.findall(chunk, start, end):
        above[counter.decode().lower()] = float(said)
        above.pop(_TOLD, None)
        above[_HEADED] = False
    between = chunk[start:end].lower()
    if not any(word in between for word in MAY_HEAD):
        return
    for heading in HEADING.finditer(chunk, start, end):
        above[_TRAINS] = above.get(_TRAINS, False) or heading[1] is not None
        above[_ANNOUNCED] = heading[0].rstrip().endswith(b"...") and not above[_TRAINS]
        above[_HEADED] = heading[1] is None and (chunk[heading.end() : end].isspace() + 1)


def _is_below(heading: int, values: LineValues) -> bool:
    """Whether a record belongs to the heading of validation above it: one that names training does not."""
    if any("train" in name.lower() for name in values if is_loss(name)):
        return False
    return heading == RIGHT_ABOVE or not any(counter_of(name) for name in values)


def _goes_on(values: LineValues, before: LineValues, announced: bool) -> bool:
    """Whether a record below a heading is the next of training: the same names, and a counter further on; below "Evaluating...",
    and below a line of validation, the same names are enough where no heading of training ends what that begins."""
    names = [name for name in values if not name.startswith("\0")]
    if not before or names != [name for name in before if not name.startswith("\0") and name != STEP_ABOVE]:
        return False
    counters = [name for name in names if counter_of(name)]
    if not counters:
        return announced
    if "epoch" in counters and (values["epoch"] or 0.0) > (before["epoch"] or 0.0):
        return True
    further = [(values[n] or 0.0) - (before[n] or 0.0) for n in counters]
    return min(further) >= 0 and max(further) > 0


def _hits(one: TextFormat, chunk: bytes) -> Callable[[int], int]:
    """A function: place -> the first place from there on at which a line may be a record, or -1."""
    if not one.words:
        search = one.trigger.search
        return lambda at: found.start() if (found := search(chunk, at)) else -1
    return next_place(one.words, chunk)


def _from_above(values: LineValues, above: dict[str, Any]) -> None:
    """Add what stands above: an epoch holds until the next is announced, a step for the first loss of each name below it."""
    if "epoch" in above and "epoch" not in values:
        values["epoch"] = above["epoch"]
    if all(name in _NO_STEPS for name in above):
        return
    losses = [name for name in values if is_loss(name)]
    told = above.setdefault(_TOLD, [])
    for name in [name for name in above if name not in _NO_STEPS]:
        if any(loss in told for loss in losses):
            del above[name]
        else:
            values.setdefault(STEP_ABOVE, above[name])
    told += losses


def _follow(chunk: bytes, at: int, values: LineValues) -> int:
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

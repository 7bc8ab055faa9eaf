"""Records of a text whose loss has another name, or whose numbers stand on several lines.

    Epoch 3 | Error: 2.31                 an error, cost, objective... where nothing is called a loss
    Epoch 3                               a counter opens a record,
      Total: 2.31                         the numbers below belong to it,
      lr: 1e-4                            until it counts on or a name comes again
    epoch 3: 2.31                         one number beside a counter

The reader learns from the beginning of the text what recurs: which lines hold a column, whether counters stand before or after
their numbers, and which column is the loss (``loss_column.py``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stabilitylab.logs.column_names import counter_of, is_evaluation, is_loss
from stabilitylab.logs.free_text import (
    HEADING,
    MAY_HEAD,
    RIGHT_ABOVE,
    counted_on,
    is_of_validation,
    prepared,
    prepared_english,
)
from stabilitylab.logs.languages import is_foreign
from stabilitylab.logs.line_numbers import named, placed
from stabilitylab.logs.line_templates import Plans, ReadLine
from stabilitylab.logs.loss_column import FEWEST, is_count, loss_of, missed
from stabilitylab.logs.pattern import NUMBER, LineValues, next_place, number, plain_text
from stabilitylab.logs.reading import Reading, Row, text_rows
from stabilitylab.logs.source import LogFile

_LEARNED_FROM = 400  # records
_LEARNED_LINES = 8_000
_COMPARED_LINES = 1_000
_NOISE = 20  # a column this many times as frequent as the loss belongs to other lines
_SAID_LOSS = re.compile(rb"loss[\w ]*['\"]?\s*[:=(\[]\s*[-+\d.]", re.IGNORECASE)
_HAS_NUMBER = re.compile(rb"\d")
_DECIMAL = re.compile(r"(?<![\w.,/-])[-+]?\d+\.\d+(?:[eE][-+]?\d+)?(?![\w.%/])")
# 3 2.31, 3 tensor(2.31): from print(epoch, loss)
_BARE = re.compile(
    rf"\s*(\d+)(?:\s*[,:;]\s*|\s+)(?:\w+[.\w]*\()?({NUMBER})(?:, [\w=<>' ]+)?\)?\s*$", re.IGNORECASE
)
# 2.31, tensor(2.31, grad_fn=<MseLossBackward0>) on a line of its own
_LONE = re.compile(r"\s*(?:\w+[.\w]*\(\[?)?([-+]?\d+\.\d+(?:[eE][-+]?\d+)?)\]?(?:, [\w=<>':, ]+)?\)?\s*$")
_ALONE = "value"  # the name of a number without one


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """The layout of a text's records in its lines.

    Attributes:
        names: the columns that recur.
        leads: the counters that open a record.
        words: in small letters; a line without any of them belongs to no record; if empty, any line may hold a column.
        prepare: applied to the text first.
        headed: whether headings divide it into training and validation.
    """

    names: frozenset[str]
    leads: frozenset[str]
    words: tuple[bytes, ...]
    prepare: Callable[[bytes], bytes]
    headed: bool = False


def read_record_lines(source: LogFile, beside: Reading | None) -> Reading | None:
    """The text as records over several lines; None: nothing recurs in it that could be a loss.

    Args:
        source: the text.
        beside: the reading of its lines one by one, if they name a loss; replaced only where it misses a signal, the steps or the
            total.
    """
    prepare = prepared_english if is_foreign(source.head().decode("utf-8", "replace")) else prepared
    most = _LEARNED_LINES if beside is None else _COMPARED_LINES
    rows, order, unsaid = _first_rows(source, prepare, None, most)
    if beside is None:
        if (loss := loss_of(rows)) is None:
            return None
        if loss and len(_SAID_LOSS.findall(source.head())) >= FEWEST:
            loss = ""  # another column called so stands beside it, unread
    else:
        rows, order, unsaid = _first_rows(source, prepare, _layout(rows, order, unsaid, "", prepare), most)
        if (loss := missed(rows, beside)) is None:
            return None
    layout = _layout(rows, order, unsaid, loss, prepare)
    if HEADING.search(prepare(source.head())):
        words = layout.words and (*layout.words, *MAY_HEAD)
        layout = replace(layout, headed=True, words=words)
    reading = Reading(
        format="text",
        rows=lambda: text_rows(source, reading),
        losses=(loss,) if loss else (),
        pieces=lambda: RecordPieces(layout),
    )
    return reading


def _layout(
    rows: Sequence[LineValues],
    order: Mapping[str, int],
    unsaid: set[str],
    loss: str,
    prepare: Callable[[bytes], bytes],
) -> RecordLayout:
    """The layout of a text that begins with these records. ``loss``: the loss's column; "": its name says so."""
    count = Counter(name for row in rows for name in row)
    of_loss = count[loss] if loss else max((count[n] for n in count if is_loss(n)), default=0)
    names = frozenset(
        n
        for n in count
        if not of_loss
        or 2 * count[n] >= of_loss >= count[n] / _NOISE
        or n == loss
        or is_loss(n)
        or counter_of(n)
    )
    opens = min((order[n] for n in order if n == loss or (not loss and is_loss(n))), default=0)
    leads = frozenset(n for n in names if is_count(n) and order[n] <= opens)
    # a counter known only by its place may stand in any line
    words = set() if unsaid & names else {_word_of(n) for n in names}
    return RecordLayout(names, leads, tuple(sorted(words)), prepare)


class RecordPieces:
    """Takes records out of the lines that hold their columns."""

    def __init__(self, layout: RecordLayout | None) -> None:
        self._layout = layout
        self._read = Plans(_read).read
        self.state: dict[str, Any] = {"held": {}, "epoch": None, "before": {}, "headed": 0}

    def take(self, piece: bytes) -> Iterator[Row]:
        """The complete records."""
        layout = self._layout
        piece = layout.prepare(piece) if layout else piece
        headed = layout is None or layout.headed
        for line in _lines_with(layout.words, piece) if layout and layout.words else piece.splitlines():
            if headed and (heading := HEADING.match(line)):
                self.state["trains"] = self.state.get("trains", False) or heading[1] is not None
                announced = heading[0].rstrip().endswith(b"...") and not self.state["trains"]
                self.state["headed"] = 0 if heading[1] else RIGHT_ABOVE - announced
            elif _HAS_NUMBER.search(line):
                values, _ = self._read(plain_text(line))
                if values and not (headed and self._is_of_validation(values)):
                    yield from self._join(values)

    def _is_of_validation(self, values: LineValues) -> bool:
        """Whether a heading of validation stands above; it holds until a counter comes that is not right below it."""
        above: int = self.state["headed"]
        counts = any(is_count(name) for name in values)
        if above == RIGHT_ABOVE:  # of a text that also announces training, until it does
            self.state["headed"] = RIGHT_ABOVE if counts and self.state.get("trains") else 1
        elif counts:
            self.state["headed"] = 0
        below = above == RIGHT_ABOVE or (above > 0 and not counts)
        return below and not any("train" in name.lower() for name in values if not is_count(name))

    def _join(self, values: LineValues) -> Iterator[Row]:
        layout, held = self._layout, self.state["held"]
        if layout and not values.keys() <= layout.names:
            values = {n: x for n, x in values.items() if n in layout.names or n.startswith("\0")}
        again = any(_opens(n, x, held, layout) for n, x in values.items())
        if again:
            yield from self.end()
        self.state["held"] |= values

    def end(self) -> Iterator[Row]:
        """The last record."""
        held, self.state["held"] = self.state["held"], {}
        if "epoch" in held:
            self.state["epoch"] = held["epoch"]
        elif self.state["epoch"] is not None and held:
            held["epoch"] = self.state["epoch"]
        if any(not is_count(name) for name in held):
            row = counted_on(held, self.state["before"])
            self.state["before"] = held
            yield "", row


def _lines_with(words: Sequence[bytes], piece: bytes) -> Iterator[bytes]:
    """The lines in which one of the words stands."""
    after, at = next_place(words, piece), 0
    while (hit := after(at)) >= 0:
        start, end = piece.rfind(b"\n", 0, hit) + 1, piece.find(b"\n", hit)
        at = end = len(piece) if end < 0 else end
        yield from piece[start:end].splitlines()  # carriage returns separate a bar's states


def _opens(name: str, x: float | None, held: LineValues, layout: RecordLayout | None) -> bool:
    """Whether a number opens a new record instead of belonging to the held one."""
    if name in held:
        return held[name] != x or not is_count(name)
    return bool(held) and is_count(name) and (layout is None or name in layout.leads)


def _read(line: str) -> ReadLine:
    """The numbers of a line; only the counters of one of validation."""
    line, values = named(line)
    values = placed(line, values)
    first = _DECIMAL.search(line)
    if is_of_validation(line[: first.start()] if first else line):
        return {n: x for n, x in values.items() if is_count(n)}, ""
    if values and all(is_count(name) for name in values) and len(alone := _DECIMAL.findall(line)) == 1:
        values[_ALONE] = number(alone[0])
    elif not values and (bare := _BARE.match(line)):
        values = {"step": float(bare[1]), _ALONE: number(bare[2])}
    elif not values and (lone := _LONE.match(line)):
        values = {_ALONE: number(lone[1])}
    return {n: x for n, x in values.items() if not is_evaluation(n)}, ""


def _first_rows(
    source: LogFile, prepare: Callable[[bytes], bytes], layout: RecordLayout | None, most: int
) -> tuple[list[LineValues], dict[str, int], set[str]]:
    """Records of the beginning, where each name came first, and the names that do not stand in their lines."""
    pieces, lines, counted = RecordPieces(layout), 0, 0
    place: LineValues = {}
    rows: list[LineValues] = []
    order: dict[str, int] = {}
    unsaid: set[str] = set()
    for chunk in source.chunks():
        for line in prepare(chunk).splitlines():
            lines += 1
            for _, values in pieces.take(line):
                rows.append(dict(values))
                before, place = place, {n: x for n, x in values.items() if is_count(n)}
                counted += place != before  # an epoch that goes on opens no record
            for name in pieces.state["held"]:
                if name not in order:
                    order[name] = lines
                    if _word_of(name) not in line.lower():
                        unsaid.add(name)
            if counted > _LEARNED_FROM or lines > most:
                return rows, order, unsaid
    rows += [dict(values) for _, values in pieces.end()]
    return rows, order, unsaid


def _word_of(name: str) -> bytes:
    """A name's last word, in small letters; for a place, the name itself."""
    words = re.findall(r"[^\W\d_]+", name)
    return (words[-1].lower() if words else name).encode()

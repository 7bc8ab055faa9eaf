"""Records of a text whose loss goes by another name, or whose numbers stand on several lines.

    Epoch 3 | Error: 2.31                 an error, cost, objective... where nothing is called a loss
    Epoch 3                               a counter opens a record,
      Total: 2.31                         the numbers below belong to it,
      lr: 1e-4                            until it counts on or a name comes again
    epoch 3: 2.31                         one number beside a counter

What recurs is learned from the beginning of the text: which lines hold a column, whether counters stand before or behind
their numbers, and which column is the loss: by its name where the name says so, and where it says only "train", or nothing, by
its falling. A column that several names could be is left to ``--loss``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from statistics import median
from typing import Any

from stabilitylab.logs.any_text import (
    HEADING,
    MAY_HEAD,
    RIGHT_ABOVE,
    counted_on,
    is_of_validation,
    prepared,
    prepared_english,
)
from stabilitylab.logs.columns import counter_of, is_evaluation, is_loss
from stabilitylab.logs.languages import is_foreign
from stabilitylab.logs.line_numbers import named, placed
from stabilitylab.logs.pattern import NUMBER, LineValues, next_place, number, plain_text
from stabilitylab.logs.plans import Plans, ReadLine
from stabilitylab.logs.reading import Reading, Row, text_rows
from stabilitylab.logs.source import LogFile

_LEARNED_FROM = 400  # records
_LEARNED_LINES = 8_000
_COMPARED_LINES = 1_000
_NOISE = 20  # a column that is so many times as frequent as the loss is of other lines
_FEWEST = 3
_SAID_LOSS = re.compile(rb"loss[\w ]*['\"]?\s*[:=(\[]\s*[-+\d.]", re.IGNORECASE)
_HAS_NUMBER = re.compile(rb"\d")
_DECIMAL = re.compile(r"(?<![\w.,/-])[-+]?\d+\.\d+(?:[eE][-+]?\d+)?(?![\w.%/])")
# 3 2.31, 3 tensor(2.31): what print(epoch, loss) prints
_BARE = re.compile(
    rf"\s*(\d+)(?:\s*[,:;]\s*|\s+)(?:\w+[.\w]*\()?({NUMBER})(?:, [\w=<>' ]+)?\)?\s*$", re.IGNORECASE
)
# 2.31, tensor(2.31, grad_fn=<MseLossBackward0>) on a line of its own
_LONE = re.compile(r"\s*(?:\w+[.\w]*\(\[?)?([-+]?\d+\.\d+(?:[eE][-+]?\d+)?)\]?(?:, [\w=<>':, ]+)?\)?\s*$")
_ALONE = "value"  # what a number is called that has no name
# What a loss is called where nothing is called one, best first; each a family of which one column is taken.
_FAMILIES = tuple(
    re.compile(rf"\b(?:{words})\b")
    for words in (
        "cross ?entropy|xentropy|ce|xe|nll|neg log likelihood|negative log likelihood",
        "objective|obj|cost|costs|criterion",
        "bce|elbo|l|free energy",
        "mse|rmse|mae|error|err|errors|recon|reconstruction|residual|misfit|deviance|impurity",
        "ppl|perplexity|pplx|bpc|bpd|bpb|bits per \\w+|bits (?:dim|char|byte|token|word)|nats",
    )
)
_TOTAL = re.compile(r"\b(?:total|overall|combined)\b")
_SUM = re.compile(r"\b(?:total|sum|value)\b")
_TRAIN = re.compile(r"\b(?:train|training|tr|trn)\b")
_BOUND = re.compile(r"\belbo\b")  # of which a likelihood is a part
_PER = re.compile(r"\bbits (?:per )?\w+")
# What no loss is called, or what is a share of something that rises.
_NO_LOSS = re.compile(
    r"\b(?:lrs?|rate|learning|norms?|gn|grads?|gradients?|time|times|sec|secs|seconds|ms|eta|speed|mem|memory|gpu|tok|tokens|"
    r"samples|acc|accuracy|f1|auc|score|scores|reward|rewards|return|precision|recall|iou|dice|psnr|ssim|bleu|top ?\d|fitness|"
    r"best|min|max|std|weights?|scale|coef\w*|size|beta|alpha|tau|eps|epsilon|temp|temperature|wer|cer|r2|dim|len|count|"
    r"momentum|threshold|elapsed|baseline|clip|val|valid|validation|test|eval|dev|held|tst)\b|%"
)
_SHARE = re.compile(r"\b(?:acc|accuracy)\b")
_OF_PARTS = 3  # from this family on a name may be one of the parts of what "train" alone says
# Beside which a mean square, or a reconstruction, is one part of several.
_A_PART = re.compile(r"\b(?:mse|bce|recon|reconstruction)\b")
_PARTS = re.compile(r"\b(?:l1|l2|kl\w*|recon\w*|reg|dur|adv|gan|perc\w*|ssim|lpips)\b")
# What is counted and is no time: a loss of each is a table.
_NO_COUNTER = re.compile(
    r"\b(?:fold|seed|trial|run|client|layer|task|sample|query|test|case|image|user|gpu|rank|worker|part|chapter|section|question|"
    r"id|node|class|line|row|col|column|item|page|point|version|port|pid|thread|retry|attempt|size|count|total|wins?)\b"
)
_SIGNALS = {
    "rate": re.compile(r"\b(?:lrs?|learning rate)\b"),
    "norm": re.compile(r"\b(?:grad(?:ient)? ?norm|gnorm|gn|norm)\b"),
    "scale": re.compile(r"\bloss scale\b"),
}


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """How a text's records stand in its lines.

    Attributes:
        names: of the columns that recur.
        leads: the counters that open a record.
        words: in small letters; a line that holds none of them is another's; none: any line may hold a column.
        prepare: what the text goes through first.
        headed: whether headings part it into training and validation.
    """

    names: frozenset[str]
    leads: frozenset[str]
    words: tuple[bytes, ...]
    prepare: Callable[[bytes], bytes]
    headed: bool = False


def read_record_lines(source: LogFile, beside: Reading | None) -> Reading | None:
    """The text as records over lines; None: nothing in it recurs that could be a loss.

    Args:
        source: the text.
        beside: what reads its lines one by one, if they name a loss: it is replaced only where it misses a signal, the steps or
            the total.
    """
    prepare = prepared_english if is_foreign(source.head().decode("utf-8", "replace")) else prepared
    most = _LEARNED_LINES if beside is None else _COMPARED_LINES
    rows, order, unsaid = _first_rows(source, prepare, None, most)
    if beside is None:
        if (loss := _loss_of(rows)) is None:
            return None
        if loss and len(_SAID_LOSS.findall(source.head())) >= _FEWEST:
            loss = ""  # something that is called so, and is not read, stands beside it
    else:
        rows, order, unsaid = _first_rows(source, prepare, _layout(rows, order, unsaid, "", prepare), most)
        if (loss := _missed(rows, beside)) is None:
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
    """Of a text that begins with these records. ``loss``: which column it is; "": it says so itself."""
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
    leads = frozenset(n for n in names if _counts(n) and order[n] <= opens)
    # a number that counts by where it stands may be in any line
    words = set() if unsaid & names else {_word_of(n) for n in names}
    return RecordLayout(names, leads, tuple(sorted(words)), prepare)


class RecordPieces:
    """Records out of the lines that hold their columns."""

    def __init__(self, layout: RecordLayout | None) -> None:
        self._layout = layout
        self._read = Plans(_read).read
        self.state: dict[str, Any] = {"held": {}, "epoch": None, "before": {}, "headed": 0}

    def take(self, piece: bytes) -> Iterator[Row]:
        """The records that are complete."""
        layout = self._layout
        piece = layout.prepare(piece) if layout else piece
        headed = layout is None or layout.headed
        for line in _lines_with(layout.words, piece) if layout and layout.words else piece.splitlines():
            if headed and (heading := HEADING.match(line)):
                self.state["headed"] = 0 if heading[1] else RIGHT_ABOVE
            elif _HAS_NUMBER.search(line):
                values, _ = self._read(plain_text(line))
                if values and not (headed and self._is_of_validation(values)):
                    yield from self._join(values)

    def _is_of_validation(self, values: LineValues) -> bool:
        """Whether a heading of validation is above: until a counter comes that does not stand right below it."""
        above: int = self.state["headed"]
        counts = any(_counts(name) for name in values)
        if above and counts != (above == RIGHT_ABOVE):
            self.state["headed"] = 0 if counts else 1
        below = above == RIGHT_ABOVE or (above > 0 and not counts)
        return below and not any("train" in name.lower() for name in values if not _counts(name))

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
        if any(not _counts(name) for name in held):
            row = counted_on(held, self.state["before"])
            self.state["before"] = held
            yield "", row


def _lines_with(words: Sequence[bytes], piece: bytes) -> Iterator[bytes]:
    """The lines in which one of the words stands."""
    after, at = next_place(words, piece), 0
    while (hit := after(at)) >= 0:
        start, end = piece.rfind(b"\n", 0, hit) + 1, piece.find(b"\n", hit)
        at = end = len(piece) if end < 0 else end
        yield from piece[start:end].splitlines()  # a bar's states are parted by returns


def _opens(name: str, x: float | None, held: LineValues, layout: RecordLayout | None) -> bool:
    """Whether a number is another record's than what is held."""
    if name in held:
        return held[name] != x or not _counts(name)
    return bool(held) and _counts(name) and (layout is None or name in layout.leads)


def _read(line: str) -> ReadLine:
    """The numbers of a line; of one of validation the counters."""
    line, values = named(line)
    values = placed(line, values)
    first = _DECIMAL.search(line)
    if is_of_validation(line[: first.start()] if first else line):
        return {n: x for n, x in values.items() if _counts(n)}, ""
    if values and all(_counts(name) for name in values) and len(alone := _DECIMAL.findall(line)) == 1:
        values[_ALONE] = number(alone[0])
    elif not values and (bare := _BARE.match(line)):
        values = {"step": float(bare[1]), _ALONE: number(bare[2])}
    elif not values and (lone := _LONE.match(line)):
        values = {_ALONE: number(lone[1])}
    return {n: x for n, x in values.items() if not is_evaluation(n)}, ""


def _first_rows(
    source: LogFile, prepare: Callable[[bytes], bytes], layout: RecordLayout | None, most: int
) -> tuple[list[LineValues], dict[str, int], set[str]]:
    """Records of the beginning, where each name came first, and which names do not stand in their lines."""
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
                before, place = place, {n: x for n, x in values.items() if _counts(n)}
                counted += place != before  # an epoch that goes on is no record's
            for name in pieces.state["held"]:
                if name not in order:
                    order[name] = lines
                    if _word_of(name) not in line.lower():
                        unsaid.add(name)
            if counted > _LEARNED_FROM or lines > most:
                return rows, order, unsaid
    rows += [dict(values) for _, values in pieces.end()]
    return rows, order, unsaid


def _loss_of(rows: Sequence[LineValues]) -> str | None:
    """The column that is the loss; "": several could be; None: none could."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, x in row.items():
            if x is not None:
                columns.setdefault(name, []).append(x)
    likely = {n: c for n, c in columns.items() if not _counts(n) and len(c) >= _FEWEST and _is_measured(c)}
    said = {n: spoken(n) for n in likely}
    rising = {n for n in likely if _BOUND.search(said[n]) and _rises(likely[n])}  # whose negative is the loss
    could = [
        n
        for n in likely
        if not _NO_LOSS.search(_PER.sub("", said[n])) and not _is_complement(n, columns) and n not in rising
    ]
    counted = any(_is_counter(n, c) and len(c) >= _FEWEST for n, c in columns.items())
    if rising and counted and not could:
        return ""
    if not could or not (counted or any(_SIGNALS["norm"].search(s) for s in said.values())):
        return None
    totals = [n for n in could if _TOTAL.search(said[n])]
    trains = any(seek.search(s) for s in map(spoken, columns) for seek in _SIGNALS.values())
    parts = [n for n in could if n not in totals]
    if (
        len(totals) == 1
        and (trains or parts)
        and not any(_exceeds(row, n, totals[0]) for row in rows for n in parts)
    ):
        return totals[0]
    if not counted:
        return None
    for number_, family in enumerate(_FAMILIES):
        if number_ == _OF_PARTS and (
            whole := [n for n in could if _TRAIN.fullmatch(said[n]) and _falls(likely[n])]
        ):
            return whole[0]
        fit = [n for n in could if family.search(said[n])]
        fit = [n for n in fit if _TRAIN.search(said[n])] or fit
        plain = [n for n in fit if all(said[n] in said[other] for other in fit)]
        if fit and not number_ and any(_BOUND.search(spoken(n)) for n in columns):
            return ""
        if (
            fit
            and _A_PART.search(said[fit[0]])
            and any(_PARTS.search(spoken(n)) for n in columns if n not in fit)
        ):
            return ""
        if len(plain) == 1:
            return plain[0]
        if fit:
            return ""
    falling = [n for n in could if (_TRAIN.search(said[n]) or _SUM.search(said[n])) and _falls(likely[n])]
    return falling[0] if len(falling) == 1 else ""


def _missed(rows: Sequence[LineValues], beside: Reading) -> str | None:
    """What reading line by line misses: the name of a total, "" for a signal or the steps; None: nothing, or records are lost."""
    told = sum(is_loss(n) for row in rows for n in row)
    single: list[Mapping[str, float | None]] = []
    if told < _FEWEST:
        return None
    for _, values in beside.rows():
        single.append(values)
        if (told := told - sum(is_loss(n) and not is_evaluation(n) for n in values)) <= 0:
            break
    ours, theirs = (Counter(n for row in some for n in row) for some in (rows, single))
    losses = [n for n in theirs if is_loss(n) and not is_evaluation(n)]
    if not losses or any(ours[n] != theirs[n] for n in losses):
        return None
    enough = 0.8 * max(theirs[n] for n in losses)
    total = [n for n in ours if _TOTAL.fullmatch(spoken(n)) and n not in theirs and ours[n] >= enough]
    if len(total) == 1 and not any(_exceeds(row, n, total[0]) for row in rows for n in losses):
        return total[0]

    def kinds(count: Counter[str]) -> set[str]:
        told = [spoken(n) for n in count if count[n] >= enough and not is_evaluation(n)]
        return {kind for kind, seek in _SIGNALS.items() if any(seek.search(name) for name in told)}

    def counted(some: Sequence[Mapping[str, float | None]]) -> bool:
        """Whether some counter tells nearly all records of the loss apart."""
        seen: dict[str, set[float | None]] = {}
        times = Counter(n for row in some if any(loss in row for loss in losses) for n in row)
        for row in some:
            if any(n in row for n in losses):
                for n in row:
                    if _counts(n) and not _NO_COUNTER.search(spoken(n)):
                        seen.setdefault(n, set()).add(row[n])
        every = max(sum(n in row for row in some) for n in losses)
        return any(len(told) >= enough and times[n] >= every for n, told in seen.items())

    steps = counted(rows) and not counted(single)
    return "" if kinds(ours) - kinds(theirs) or steps else None


def _word_of(name: str) -> bytes:
    """A name's last word, in small letters; of a place the name itself."""
    words = re.findall(r"[^\W\d_]+", name)
    return (words[-1].lower() if words else name).encode()


def spoken(name: str) -> str:
    """A name's words: trainLoss, train_loss and "Train Loss:" are one."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return re.sub(r"[^\w%]+|_", " ", parted).strip().lower()


@lru_cache(4096)
def _counts(name: str) -> bool:
    return counter_of(name) or name == "#" or name.startswith(("/", "\0"))


def _is_measured(column: Sequence[float]) -> bool:
    """Whether most are no whole numbers, and they differ."""
    fractions = sum(not math.isfinite(x) or x % 1 != 0 for x in column)
    return 2 * fractions > len(column) and 3 * len(set(column)) > len(column)


def _is_counter(name: str, column: Sequence[float]) -> bool:
    """By its name, or because whole numbers rise in every record."""
    if _counts(name):
        return _goes_on(column)
    said = spoken(name)
    return (
        all(x.is_integer() for x in column)
        and all(b > a for a, b in pairwise(column))
        and not _NO_COUNTER.search(said)
        and not _NO_LOSS.search(said)
    )


def _goes_on(column: Sequence[float]) -> bool:
    """Whether it counts: it rises more often than it falls, and more than once."""
    rises = sum(b > a for a, b in pairwise(column))
    falls = sum(b < a for a, b in pairwise(column))
    return rises > 1 and rises > falls


def _falls(column: Sequence[float]) -> bool:
    third = max(len(column) // 3, 1)
    return len(column) > _FEWEST and median(column[-third:]) < median(column[:third]) and min(column) >= 0


def _rises(column: Sequence[float]) -> bool:
    third = max(len(column) // 3, 1)
    return median(column[-third:]) > median(column[:third])


def _exceeds(row: LineValues, part: str, total: str) -> bool:
    a, b = row.get(part), row.get(total)
    return a is not None and b is not None and a > b


def _is_complement(name: str, columns: dict[str, list[float]]) -> bool:
    """Whether it is what an accuracy leaves."""
    mine = columns[name]
    return any(
        _SHARE.search(spoken(n)) and len(c) == len(mine) and all(
            min(abs(a + b - 1), abs(a + b - 100)) < 0.02 for a, b in zip(mine, c, strict=True)
        )
        for n, c in columns.items()
    )  # fmt: skip

"""Finds the loss among a text's columns, where none is called a loss, or the one so called misses something.

It goes by the name (``error``, ``objective``, ``nll``; the total of several), and where that says only "train", or nothing, by a
falling curve. Where several could be the loss, it leaves the choice to ``--loss``; a rate, a norm, a score or the complement of an
accuracy is no loss.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from statistics import median

from stabilitylab.logs.column_names import counter_of, is_evaluation, is_loss
from stabilitylab.logs.pattern import LineValues
from stabilitylab.logs.reading import Reading

FEWEST = 3
# Other names of a loss, best first; each is a family that gives one column.
_FAMILIES = tuple(
    re.compile(rf"\b(?:{words})\b")
    for words in (
        "cross ?entropy|xentropy|ce|xe|nll|neg log likelihood|negative log likelihood",
        "objective|obj|cost|costs|criterion",
        "bce|elbo|l|free energy",
        "l1|l2|mape|quantile|huber|poisson|tweedie|mse|rmse|mae|error|err|errors|recon|reconstruction|residual|misfit|deviance|impurity",
        "ppl|perplexity|pplx|bpc|bpd|bpb|bits per \\w+|bits (?:dim|char|byte|token|word)|nats",
    )
)
_TOTAL = re.compile(r"\b(?:total|overall|combined)\b")
_SUM = re.compile(r"\b(?:total|sum|value)\b")
_TRAIN = re.compile(r"\b(?:train|training|tr|trn)\b")
_BOUND = re.compile(r"\belbo\b")  # a likelihood is a part of it
_PER = re.compile(r"\bbits (?:per )?\w+")
# Names of no loss, or of a share of something that rises.
_NO_LOSS = re.compile(
    r"\b(?:lrs?|rate|learning|norms?|gn|grads?|gradients?|time|times|sec|secs|seconds|ms|eta|speed|mem|memory|gpu|tok|tokens|"
    r"samples|acc|accuracy|f1|auc|score|scores|reward|rewards|return|precision|recall|iou|dice|psnr|ssim|bleu|top ?\d|fitness|"
    r"best|min|max|std|weights?|scale|coef\w*|size|beta|alpha|tau|eps|epsilon|temp|temperature|wer|cer|r2|dim|len|count|"
    r"momentum|threshold|elapsed|baseline|clip|val|valid|validation|test|eval|dev|held|tst)\b|%"
)
_SHARE = re.compile(r"\b(?:acc|accuracy)\b")
_OF_PARTS = 3  # from this family on, a name may be a part of a bare "train"
# Beside these a mean square, or a reconstruction, is one part of several.
_A_PART = re.compile(r"\b(?:mse|bce|recon|reconstruction)\b")
_PARTS = re.compile(r"\b(?:l1|l2|kl\w*|recon\w*|reg|dur|adv|gan|perc\w*|ssim|lpips)\b")
# Things counted that are not time: a loss for each is a table.
_NO_COUNTER = re.compile(
    r"\b(?:fold|seed|trial|run|client|layer|task|sample|query|test|case|image|user|gpu|rank|worker|part|chapter|section|question|"
    r"id|node|class|line|row|col|column|item|page|point|version|port|pid|thread|retry|attempt|size|count|total|wins?)\b"
)
_SIGNALS = {
    "rate": re.compile(r"\b(?:lrs?|learning rate)\b"),
    "norm": re.compile(r"\b(?:l2 grads|grad(?:ient)? ?norm|gnorm|gn|norm)\b"),
    "scale": re.compile(r"\bloss scale\b"),
}


def loss_of(rows: Sequence[LineValues]) -> str | None:
    """The column that is the loss; "" where several could be; None where none could."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, x in row.items():
            if x is not None:
                columns.setdefault(name, []).append(x)
    said = {
        n: spoken(n) for n, c in columns.items() if not is_count(n) and len(c) >= FEWEST and _is_measured(c)
    }
    rising = {n for n in said if _BOUND.search(said[n]) and _rises(columns[n])}  # the negative is the loss
    could = [
        n
        for n in said
        if not _NO_LOSS.search(_PER.sub("", said[n])) and not _is_complement(n, columns) and n not in rising
    ]
    counted = any(_is_counter(n, c) and len(c) >= FEWEST for n, c in columns.items())
    if rising and counted and not could:
        return ""
    if not could or not (counted or any(_SIGNALS["norm"].search(s) for s in said.values())):
        return None
    said = {n: said[n] for n in could}
    if (total := _total_of(said, columns, rows)) is not None:
        return total
    if not counted:
        return None
    if (named := _of_a_family(said, columns)) is not None:
        return named
    falling = [n for n, s in said.items() if (_TRAIN.search(s) or _SUM.search(s)) and _falls(columns[n])]
    return falling[0] if len(falling) == 1 else ""


def _total_of(
    said: Mapping[str, str], columns: Mapping[str, list[float]], rows: Sequence[LineValues]
) -> str | None:
    """The one candidate called a total, beside parts that never exceed it or beside a rate, norm or scale of training."""
    totals = [n for n in said if _TOTAL.search(said[n])]
    parts = [n for n in said if n not in totals]
    trains = any(seek.search(s) for s in map(spoken, columns) for seek in _SIGNALS.values())
    if len(totals) != 1 or not (trains or parts):
        return None
    return None if any(_exceeds(row, n, totals[0]) for row in rows for n in parts) else totals[0]


def _of_a_family(said: Mapping[str, str], columns: Mapping[str, list[float]]) -> str | None:
    """The candidate of the first family of names that has one; "" where it has several, or names one part of several."""
    others = {n: spoken(n) for n in columns}
    for rank, family in enumerate(_FAMILIES):
        if rank == _OF_PARTS:
            whole = [n for n, s in said.items() if _TRAIN.fullmatch(s) and _falls(columns[n])]
            if whole:
                return whole[0]
        fit = [n for n, s in said.items() if family.search(s)]
        fit = [n for n in fit if _TRAIN.search(said[n])] or fit
        if not fit:
            continue
        if rank == 0 and any(_BOUND.search(s) for s in others.values()):
            return ""
        if _A_PART.search(said[fit[0]]) and any(_PARTS.search(s) for n, s in others.items() if n not in fit):
            return ""
        plain = [n for n in fit if all(said[n] in said[other] for other in fit)]
        return plain[0] if len(plain) == 1 else ""
    return None


def missed(rows: Sequence[LineValues], beside: Reading) -> str | None:
    """What reading line by line misses: the name of a total, or "" for a signal or the steps; None for nothing, or if records are
    lost."""
    told = sum(is_loss(n) for row in rows for n in row)
    single: list[Mapping[str, float | None]] = []
    if told < FEWEST:
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
                    if is_count(n) and not _NO_COUNTER.search(spoken(n)):
                        seen.setdefault(n, set()).add(row[n])
        every = max(sum(n in row for row in some) for n in losses)
        return any(len(told) >= enough and times[n] >= every for n, told in seen.items())

    steps = counted(rows) and not counted(single)
    return "" if kinds(ours) - kinds(theirs) or steps else None


def spoken(name: str) -> str:
    """A name's words: trainLoss, train_loss and "Train Loss:" are the same."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return re.sub(r"[^\w%]+|_", " ", parted).strip().lower()


@lru_cache(4096)
def is_count(name: str) -> bool:
    """Whether it counts steps, epochs or places in a text."""
    return counter_of(name) or name == "#" or name.startswith(("/", "\0"))


def _is_measured(column: Sequence[float]) -> bool:
    """Whether most numbers are not whole, and they differ."""
    fractions = sum(not math.isfinite(x) or x % 1 != 0 for x in column)
    return 2 * fractions > len(column) and 3 * len(set(column)) > len(column)


def _is_counter(name: str, column: Sequence[float]) -> bool:
    """Whether it counts, by its name or because whole numbers rise in every record."""
    if is_count(name):
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
    return len(column) > FEWEST and median(column[-third:]) < median(column[:third]) and min(column) >= 0


def _rises(column: Sequence[float]) -> bool:
    third = max(len(column) // 3, 1)
    return median(column[-third:]) > median(column[:third])


def _exceeds(row: LineValues, part: str, total: str) -> bool:
    a, b = row.get(part), row.get(total)
    return a is not None and b is not None and a > b


def _is_complement(name: str, columns: dict[str, list[float]]) -> bool:
    """Whether it is 1 or 100 less an accuracy."""
    mine = columns[name]
    return any(
        _SHARE.search(spoken(n)) and len(c) == len(mine) and all(
            min(abs(a + b - 1), abs(a + b - 100)) < 0.02 for a, b in zip(mine, c, strict=True)
        )
        for n, c in columns.items()
    )  # fmt: skip

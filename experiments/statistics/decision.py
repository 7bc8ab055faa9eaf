"""The verdict on two arms: which law fits, what it says, and when one may stop.

    supported    the arm differs from the baseline the claimed way
    against      it differs the other way
    equivalent   the whole interval lies within the smallest effect of interest: whatever difference there is does not matter
    undecided    none of these yet; the detectable effect says what these runs would have seen

The law follows from the values that were seen by then, so that a decision stands whatever comes later: shares where all are 0
or 1; ranks where one is infinite, on request, or where the spread is within ``FINE`` steps of the grid on which the values lie
(counts, rounded figures); Student's t else. On a grid the spread is often small by chance, and t large with it: there order
decides. Runs that died are infinite on the bad side: worse than any number, alike among themselves.

*Once* is for a number of runs fixed beforehand; equivalence then is two one-sided tests at alpha (Schuirmann 1987), the interval
shown has level 1 - alpha. *Sequential* looks after every run from the fourth on and stops at the first look that decides; both
guarantees hold for that stopping. No verdict rests on fewer than four runs an arm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.statistics.law import Evidence, Law
from experiments.statistics.proportions import PairedRates, UnpairedRates
from experiments.statistics.ranks import RankSum, SignedRanks, Signs, difference
from experiments.statistics.student import PairedT, UnpairedT
from stabilitylab.errors import InputError

Scale = Literal["linear", "log", "rank"]
Direction = Literal["less", "more"]
Word = Literal["supported", "against", "equivalent", "undecided"]

LEAST_SEEDS = 4
ALPHA = 0.05
# Steps of the values' grid that the standard deviation must reach for Student's law.
FINE = 2.0


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the runs say.

    Attributes:
        verdict: see the module.
        n: runs of the arm that was given fewer, or pairs, up to the look that decided.
        effect: arm minus baseline; of logarithms on the log scale. NaN without any run.
        low, high: its interval of level 1 - alpha.
        e_value: evidence against "no difference", at its largest so far; 1 says nothing, 20 decides at 5 %.
        p_value: of "no difference"; on sequential looks the inverse of ``e_value``.
        detectable: the effect that these runs would have decided with a power of 80 %; infinite: none.
        law: by which it was judged.
        censored: infinite values among those judged.
    """

    verdict: Word
    n: int
    effect: float
    low: float
    high: float
    e_value: float
    p_value: float
    detectable: float
    law: str
    censored: int = 0


NOTHING = Decision(
    verdict="undecided",
    n=0,
    effect=math.nan,
    low=-math.inf,
    high=math.inf,
    e_value=1.0,
    p_value=1.0,
    detectable=math.inf,
    law="none",
)


def decide(
    arm: Sequence[float],
    baseline: Sequence[float] | None,
    *,
    paired: bool = True,
    direction: Direction = "less",
    scale: Scale = "linear",
    margin: float | None = None,
    sequential: bool = True,
    alpha: float = ALPHA,
) -> Decision:
    """Judge an arm against a baseline.

    Args:
        arm, baseline: one value a run, in the order in which runs came in; infinite where a run has none. ``baseline`` None: zero.
        paired: whether the i-th runs of both share their seed.
        direction: of what is claimed of the arm.
        scale: "log" compares logarithms; "rank" orders only.
        margin: smallest effect of interest, in the unit of the effect; None: nothing is called equivalent.
        sequential: look after every run; else once, at the end.
        alpha: chance of a false verdict.

    Raises:
        InputError: a value is NaN, or not positive on the log scale; pairs do not match; a margin is not positive.
    """
    a = _checked(arm, scale if baseline is not None else "linear", "the arm")
    b = None if baseline is None else _checked(baseline, scale, "the baseline")
    if margin is not None and not margin > 0:
        raise InputError(f"a margin of {margin:g}: give the smallest effect of interest, above 0")
    if b is not None and paired and len(a) != len(b):
        raise InputError(f"{len(a)} runs of the arm and {len(b)} of the baseline are no pairs")
    n = len(a) if b is None else min(len(a), len(b))
    if not n:
        return NOTHING
    censored = int(np.isinf(a).sum() + (0 if b is None else np.isinf(b).sum()))
    last = Evidence(effect=math.nan, low=-math.inf, high=math.inf, sign=0, log_e=0.0)
    largest, word, seen = 0.0, "undecided", n
    law: Law | None = None
    for runs, looked in _looks(a, b, scale, paired, sequential):
        now = looked.look(alpha, sequential=sequential)
        if word == "undecided":
            last, seen, law = now, runs, looked
        if runs >= LEAST_SEEDS:
            # Runs beyond the look that decided still add evidence, which a family of claims needs more of than one claim does.
            largest = max(largest, now.log_e)
            if word == "undecided":
                word = _word(looked, now, direction, margin, alpha, sequential)
    assert law is not None
    p = min(1.0, math.exp(-largest)) if sequential else p_value(law)
    return Decision(
        verdict=word,  # type: ignore[arg-type]
        n=seen,
        effect=last.effect,
        low=last.low,
        high=last.high,
        e_value=math.exp(min(largest if sequential else last.log_e, 700.0)),
        p_value=p if n >= LEAST_SEEDS else 1.0,
        detectable=law.detectable(alpha, sequential=sequential) if seen >= LEAST_SEEDS else math.inf,
        law=law.name,
        censored=censored,
    )


def p_value(law: Law) -> float:
    """The smallest level at which one look rejects "no difference", to three digits."""
    if law.look(1e-12, sequential=False).sign:
        return 1e-12
    low, high = math.log(1e-12), 0.0
    if not law.look(1.0 - 1e-9, sequential=False).sign:
        return 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        if law.look(math.exp(middle), sequential=False).sign:
            high = middle
        else:
            low = middle
    return math.exp(high)


def _word(
    law: Law, seen: Evidence, direction: Direction, margin: float | None, alpha: float, sequential: bool
) -> Word:
    if margin is not None:
        narrow = seen if sequential else law.look(min(2 * alpha, 1.0), sequential=False)
        if -margin < narrow.low and narrow.high < margin:
            return "equivalent"
    if not seen.sign:
        return "undecided"
    return "supported" if seen.sign == (-1 if direction == "less" else 1) else "against"


def _looks(
    a: np.ndarray, b: np.ndarray | None, scale: Scale, paired: bool, sequential: bool
) -> Iterator[tuple[int, Law]]:
    most = max(len(a), 0 if b is None else len(b))
    for k in range(min(LEAST_SEEDS, most), most + 1) if sequential else (most,):
        first, other = a[:k], None if b is None else b[:k]
        kind = _kind(first, other, scale, paired)
        yield min(len(first), len(first) if other is None else len(other)), _law(first, other, kind, paired)


def _law(a: np.ndarray, b: np.ndarray | None, kind: str, paired: bool) -> Law:
    if b is None:
        return PairedT(a) if kind == "t" else Signs(a)
    if not paired:
        return {"t": UnpairedT, "rank": RankSum, "share": UnpairedRates}[kind](a, b)
    # Two that died alike are a tie, and do not bound how far the arms are apart.
    d = difference(a, b, tie=math.nan)
    return {"t": PairedT, "rank": SignedRanks, "share": PairedRates}[kind](d)


def _kind(a: np.ndarray, b: np.ndarray | None, scale: Scale, paired: bool) -> str:
    values = a if b is None else np.concatenate([a, b])
    if b is not None and scale == "linear" and np.all((values == 0) | (values == 1)):
        return "share"
    if scale == "rank" or not np.all(np.isfinite(values)):
        return "rank"
    samples = [a] if b is None else [a - b] if paired else [a, b]
    freedom = sum(len(x) for x in samples) - len(samples)
    if freedom < 1:
        return "rank"
    spread = math.sqrt(sum(float(np.var(x)) * len(x) for x in samples) / freedom)
    return "t" if spread >= FINE * _grid_step(values, log=scale == "log") else "rank"


def _grid_step(values: np.ndarray, *, log: bool) -> float:
    """The largest step of which all differences between values are multiples, for decimals of up to nine places; at least what
    float32 resolves, which is how fine a loss is. Of logarithms, the step at the median value."""
    distinct = np.unique(np.exp(values) if log else values)
    size = float(np.median(np.exp(values))) if log else 1.0
    step = float(np.max(np.abs(distinct))) * 2.0**-23
    if len(distinct) < 2 or not math.isfinite(step):
        return math.inf
    for places in range(10):
        scaled = distinct * 10.0**places
        whole = np.rint(scaled)
        if np.max(np.abs(whole)) >= 2.0**52:
            break
        if np.all(np.abs(scaled - whole) <= 1e-9 * np.maximum(1.0, np.abs(whole))):
            common = int(np.gcd.reduce(np.diff(whole).astype(np.int64)))
            step = max(step, common / 10.0**places)
            break
    return step / size


def _checked(values: Sequence[float], scale: Scale, whose: str) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if np.isnan(x).any():
        raise InputError(f"{whose} has a value that is NaN: give infinity for a run that died")
    if scale == "log":
        if (x <= 0).any():
            raise InputError(
                f"{whose} has the value {x[x <= 0][0]:g}, which has no logarithm: judge it on the linear scale"
            )
        with np.errstate(divide="ignore"):
            x = np.log(x)
    return x

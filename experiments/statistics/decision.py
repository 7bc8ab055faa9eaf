"""Gives the verdict on two arms: which law fits, what it says, and when one may stop.

    supported    the arm differs from the baseline the claimed way
    against      it differs the other way
    equivalent   the whole interval lies within the smallest effect of interest: any difference does not matter
    undecided    none of these yet; the detectable effect says what these runs would have seen

The laws follow from the values (``choice``). Runs that died are infinite on the bad side: worse than any number, equal among
themselves.

*Once* is for a number of runs fixed beforehand; equivalence then is two one-sided tests at alpha (Schuirmann 1987); the interval
shown has level 1 - alpha. *Sequential* looks after every run from the fourth on and stops at the first look that decides; both
guarantees hold for that stopping. No verdict rests on fewer than four runs an arm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from experiments.statistics.choice import LEAST_SEEDS, Scale, fitting, looks
from experiments.statistics.law import Law
from experiments.statistics.stake import Stake
from stabilitylab.errors import InputError

Direction = Literal["less", "more"]
Word = Literal["supported", "against", "equivalent", "undecided"]

ALPHA = 0.05
# Beyond this binary exponent ``decide`` scales values: squares and sums of thousands must be finite.
FAR = 400


@dataclass(frozen=True, kw_only=True)
class ClaimDecision:
    """The runs' verdict.

    Attributes:
        verdict: see the module.
        n: runs of the shorter arm, or pairs, up to the look that decided.
        effect: arm minus baseline; of logarithms on the log scale. NaN without any run.
        low, high: its interval of level 1 - alpha.
        e_value: evidence against "no difference", at its largest so far; 1 says nothing, 20 decides at 5 %.
        p_value: of "no difference"; on sequential looks the inverse of ``e_value``.
        detectable: the effect that these runs would have decided with a power of 80 %; infinite: none.
        law: that judged it.
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


NOTHING = ClaimDecision(
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
    zeros: bool = False,
    alpha: float = ALPHA,
) -> ClaimDecision:
    """Judge an arm against a baseline.

    Args:
        arm, baseline: one value a run, in the order in which runs came in; infinite where a run has none. ``baseline`` None: zero.
        paired: whether the i-th runs of both share their seed.
        direction: of the claim about the arm.
        scale: "log" compares logarithms; "rank" orders only. ``decide`` recognises yes or no (0 and 1).
        margin: smallest effect of interest, in the unit of the effect; None: no verdict is "equivalent".
        sequential: look after every run; else once, at the end.
        zeros: whether a value of 0 on the log scale ranks below all others instead of being an error.
        alpha: chance of a false verdict.

    Raises:
        InputError: a value is NaN, or not positive on the log scale; pairs do not match; a margin is not positive.
    """
    a = _checked(arm, scale if baseline is not None else "linear", "the arm", zeros)
    b = None if baseline is None else _checked(baseline, scale, "the baseline", zeros)
    if margin is not None and not margin > 0:
        raise InputError(f"a margin of {margin:g}: give the smallest effect of interest, above 0")
    if unit := _far(a, b):
        small = decide(
            np.ldexp(a, -unit).tolist(),
            None if b is None else np.ldexp(b, -unit).tolist(),
            paired=paired,
            direction=direction,
            scale="rank" if scale == "rank" else "linear",
            margin=None if margin is None else float(np.ldexp(margin, -unit)) or None,
            sequential=sequential,
            alpha=alpha,
        )
        with np.errstate(over="ignore"):
            return replace(
                small,
                effect=float(np.ldexp(small.effect, unit)),
                low=float(np.ldexp(small.low, unit)),
                high=float(np.ldexp(small.high, unit)),
                detectable=float(np.ldexp(small.detectable, unit)),
            )
    n = len(a) if b is None else min(len(a), len(b))
    if not n:
        return NOTHING
    censored = int(np.isinf(a).sum() + (0 if b is None else np.isinf(b).sum()))
    if sequential:
        found = _while_looking(looks(a, b, scale=scale, paired=paired), n, margin, direction, alpha)
    else:
        found = _at_the_end(fitting(a, b, scale=scale, paired=paired), n, margin, direction, alpha)
    return replace(found, censored=censored)


def _at_the_end(law: Law, n: int, margin: float | None, direction: Direction, alpha: float) -> ClaimDecision:
    """One look, when all runs are in."""
    found = law.look(alpha, sequential=False)
    # Two one-sided tests at alpha are an interval of level 1 - 2 alpha within the margin.
    narrow = law.look(min(2 * alpha, 1.0), sequential=False)
    within = margin is not None and -margin < narrow.low and narrow.high < margin
    return ClaimDecision(
        verdict=_word(within, found.sign, direction) if n >= LEAST_SEEDS else "undecided",
        n=n,
        effect=found.effect,
        low=found.low,
        high=found.high,
        e_value=math.exp(min(found.log_e, 700.0)),
        p_value=p_value(law) if n >= LEAST_SEEDS else 1.0,
        detectable=law.detectable(alpha, sequential=False) if n >= LEAST_SEEDS else math.inf,
        law=law.name,
    )


def _while_looking(
    stakes: Iterable[tuple[int, Stake]], n: int, margin: float | None, direction: Direction, alpha: float
) -> ClaimDecision:
    """A look after every run: the first that decides stands."""
    word: Word = "undecided"
    largest, seen, stake = 0.0, n, None
    for runs, now in stakes:
        if word == "undecided":
            seen, stake = runs, now
        if runs < LEAST_SEEDS:
            continue
        log_e, side = now.bet()
        # Runs after the deciding look still add evidence; a family of claims needs more of it than one claim.
        largest = max(largest, log_e)
        if word == "undecided":
            within = margin is not None and now.within(margin, alpha)
            word = _word(within, side if log_e >= -math.log(alpha) else 0, direction)
    assert stake is not None
    last = stake.look(alpha)
    return ClaimDecision(
        verdict=word,
        n=seen,
        effect=last.effect,
        low=last.low,
        high=last.high,
        e_value=math.exp(min(largest, 700.0)),
        p_value=min(1.0, math.exp(-largest)) if n >= LEAST_SEEDS else 1.0,
        detectable=stake.detectable(alpha) if seen >= LEAST_SEEDS else math.inf,
        law=stake.name,
    )


def _far(a: np.ndarray, b: np.ndarray | None) -> int:
    """The binary exponent of values whose squares leave float64, as their unit; 0 for all others."""
    every = np.abs(a if b is None else np.concatenate([a, b]))
    largest = float(every[np.isfinite(every)].max(initial=0.0))
    exponent = math.frexp(largest)[1]
    return exponent if abs(exponent) > FAR and largest else 0


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


def _word(within: bool, sign: int, direction: Direction) -> Word:
    if within:
        return "equivalent"
    if not sign:
        return "undecided"
    return "supported" if sign == (-1 if direction == "less" else 1) else "against"


def _checked(values: Sequence[float], scale: Scale, whose: str, zeros: bool) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if np.isnan(x).any():
        raise InputError(f"{whose} has a value that is NaN: give infinity for a run that died")
    if scale == "log":
        wrong = x < 0 if zeros else x <= 0
        if wrong.any():
            raise InputError(
                f"{whose} has the value {x[wrong][0]:g}, which has no logarithm: judge it on the linear scale"
            )
        with np.errstate(divide="ignore"):
            x = np.log(x)
    return x

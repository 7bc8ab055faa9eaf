"""Claims, and what the measured values say of them.

A claim is "arm a has less (or more) of a metric than arm b", or than nothing. Its verdict is one of

    supported     the paired 95 % interval lies on the claimed side of zero
    leaning for   every seed points the claimed way, but the interval includes zero
    undecided     the seeds disagree, or a value is missing
    leaning against, against   the same on the other side

A result against a claim is printed as large as one for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from experiments.statistics import PairedDifference, paired_difference

Judgement = Literal["supported", "leaning for", "undecided", "leaning against", "against"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """``arm`` has ``direction`` of ``metric`` than ``baseline``.

    Attributes:
        text: the claim in words, as its source makes it.
        metric: a name in ``experiments.metrics.METRICS``.
        baseline: the other arm; None: zero.
        source: who says so.
    """

    text: str
    metric: str
    arm: str
    baseline: str | None
    direction: Literal["less", "more"] = "less"
    source: str = "GLM-130B (2210.02414)"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the seeds say of a claim."""

    claim: Claim
    judgement: Judgement
    difference: PairedDifference
    arm_values: Mapping[int, float]
    baseline_values: Mapping[int, float]


def judge(claim: Claim, values: Mapping[str, Mapping[int, float]]) -> Verdict:
    """Judge a claim from ``values[arm][seed]`` of its metric."""
    arm = values.get(claim.arm, {})
    baseline = dict.fromkeys(arm, 0.0) if claim.baseline is None else values.get(claim.baseline, {})
    difference = paired_difference(arm, baseline)
    return Verdict(
        claim=claim,
        judgement=_judgement(difference, sign=-1.0 if claim.direction == "less" else 1.0),
        difference=difference,
        arm_values=arm,
        baseline_values=baseline,
    )


def _judgement(difference: PairedDifference, *, sign: float) -> Judgement:
    if not difference.seeds or any(math.isnan(d) for d in difference.differences):
        return "undecided"
    low, high = sorted((sign * difference.low, sign * difference.high))
    if low > 0:
        return "supported"
    if high < 0:
        return "against"
    if difference.signs_agree:
        return "leaning for" if sign * difference.differences[0] > 0 else "leaning against"
    return "undecided"

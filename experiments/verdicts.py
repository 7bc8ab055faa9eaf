"""Claims, and their verdicts by the measured values.

A claim is "arm a has less (or more) of a metric than arm b", or than nothing; its author writes it and the margin of its metric
down before its runs. Its verdict is supported, against, equivalent or undecided (``experiments.statistics.decision``), by values
taken seed by seed, at every look. Reports print a result against a claim as large as one for it.

A suite makes many claims. Each one's own verdict has the level 5 %; ``family`` says which hold together (Holm), and by chance alone
a suite of m claims without any effect is expected to have m times 5 % false ones at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from experiments.statistics import Scale
from experiments.statistics.decision import ALPHA, ClaimDecision, Word, decide
from experiments.statistics.multiple import holm

SeedValues = Mapping[str, Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """``arm`` has ``direction`` of ``metric`` than ``baseline``.

    Attributes:
        text: the claim in its source's words.
        metric: a name in ``experiments.metrics.METRICS``, or of a study's outcomes.
        baseline: the other arm; None: zero.
        source: who says so.
        prediction: our expectation here, written down before the first run; empty: that it holds.
    """

    text: str
    metric: str
    arm: str
    baseline: str | None
    direction: Literal["less", "more"] = "less"
    source: str = "GLM-130B (2210.02414)"
    prediction: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The seeds' verdict on a claim.

    Attributes:
        decision: the statistics.
        holds: whether the verdict also holds in the family of its suite's claims (Holm); undecided and equivalent ones do.
    """

    claim: Claim
    decision: ClaimDecision
    arm_values: Mapping[int, float]
    baseline_values: Mapping[int, float]
    holds: bool = True

    @property
    def judgement(self) -> Word:
        """The verdict's word."""
        return self.decision.verdict


def judge(
    claim: Claim,
    values: Mapping[str, Mapping[int, float]],
    *,
    scale: Scale = "linear",
    margin: float | None = None,
    worst: float | None = math.inf,
    sequential: bool = True,
) -> Verdict:
    """Judge a claim from ``values[arm][seed]`` of its metric.

    Args:
        scale, margin: of the metric, see ``decide``.
        worst: replaces a missing number (NaN, of a run that died before it had one); None: leave its seed out.
        sequential: whether one added seeds while looking.
    """
    arm = dict(values.get(claim.arm, {}))
    baseline = {} if claim.baseline is None else dict(values.get(claim.baseline, {}))
    if worst is None:
        arm, baseline = (
            {seed: x for seed, x in side.items() if not math.isnan(x)} for side in (arm, baseline)
        )
    else:
        arm, baseline = (
            {seed: worst if math.isnan(x) else x for seed, x in side.items()} for side in (arm, baseline)
        )
    seeds = sorted(arm if claim.baseline is None else arm.keys() & baseline.keys())
    first = [arm[seed] for seed in seeds]
    other = None if claim.baseline is None else [baseline[seed] for seed in seeds]
    decision = decide(
        first,
        other,
        direction=claim.direction,
        scale=scale,
        margin=margin,
        sequential=sequential,
        # A ratio of 0 has no logarithm, but an order.
        zeros=True,
    )
    return Verdict(claim=claim, decision=decision, arm_values=arm, baseline_values=baseline)


class Judged(Protocol):
    """How to judge a metric or an outcome."""

    @property
    def scale(self) -> Scale: ...
    @property
    def margin(self) -> float | None: ...
    @property
    def unit(self) -> str: ...
    @property
    def worst(self) -> float | None: ...


def judge_all(
    claims: Sequence[Claim], values: SeedValues, how: Mapping[str, Judged], *, sequential: bool = True
) -> list[Verdict]:
    """The verdict on every claim, and whether it holds among all of them.

    Args:
        values: ``values[metric][arm][seed]``.
        how: to judge each metric, by its name.
    """
    return family(
        [
            judge(
                claim,
                values.get(claim.metric, {}),
                scale=how[claim.metric].scale,
                margin=how[claim.metric].margin,
                worst=how[claim.metric].worst,
                sequential=sequential,
            )
            for claim in claims
        ]
    )


def family(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The same verdicts, each with whether it holds among all of them at 5 %."""
    adjusted = holm([verdict.decision.p_value for verdict in verdicts])
    return [
        Verdict(
            claim=verdict.claim,
            decision=verdict.decision,
            arm_values=verdict.arm_values,
            baseline_values=verdict.baseline_values,
            holds=verdict.judgement not in ("supported", "against") or p <= ALPHA,
        )
        for verdict, p in zip(verdicts, adjusted, strict=True)
    ]


def undecided_together(verdicts: Sequence[Verdict]) -> bool:
    """Whether any claim still needs seeds, each at its own level and all within the family."""
    return any(verdict.judgement == "undecided" or not verdict.holds for verdict in family(verdicts))


def record(verdict: Verdict) -> dict[str, Any]:
    """A verdict as strict JSON: infinities and NaN are null."""
    return {
        "claim": verdict.claim.text,
        "metric": verdict.claim.metric,
        **plain(verdict.decision),
        "holds_in_family": verdict.holds,
    }


def plain(decision: ClaimDecision) -> dict[str, Any]:
    """A decision as strict JSON: infinities and NaN are null."""
    return {
        "verdict": decision.verdict,
        "n": decision.n,
        "effect": _finite(decision.effect),
        "interval": [_finite(decision.low), _finite(decision.high)],
        "e_value": decision.e_value,
        "p_value": decision.p_value,
        "detectable_effect": _finite(decision.detectable),
        "law": decision.law,
        "censored": decision.censored,
    }


def effect_words(verdict: Verdict, outcome: Judged) -> str:
    """The effect with its interval, in words that a reader can check: ``+2.5 octaves [+2, +2.5]``; a ratio as a factor."""
    one = verdict.decision
    if not one.n:
        return "no seed in both arms"
    if outcome.scale == "log" and one.law == "t":
        factor, low, high = (math.exp(min(x, 700.0)) for x in (one.effect, one.low, one.high))
        return f"x {_factor(factor)} [x {_factor(low)}, x {_factor(high)}]"
    unit = f" {outcome.unit}" if outcome.unit else ""
    if not (math.isfinite(one.low) or math.isfinite(one.high)):
        return f"{_signed(one.effect)}{unit}, no bounds yet"
    return f"{_signed(one.effect)}{unit} [{_signed(one.low)}, {_signed(one.high)}]"


def _signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"


def _factor(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.5g}" if 1e-3 <= value < 1e5 else f"{value:.2g}"


def evidence_words(e_value: float) -> str:
    """An e-value: ``280``, ``3e6``."""
    if e_value < 1e4:
        return f"{float(f'{e_value:.2g}'):,g}"
    digits, _, power = f"{e_value:.0e}".partition("e")
    return f"{digits}e{int(power)}"


def seeds_words(verdict: Verdict) -> str:
    """How many seeds the verdict took, of those run in both arms: ``6 of 10``, or ``10``."""
    seeds = set(verdict.arm_values)
    if verdict.claim.baseline is not None:
        seeds &= verdict.baseline_values.keys()
    return str(len(seeds)) if verdict.decision.n == len(seeds) else f"{verdict.decision.n} of {len(seeds)}"


def words(decision: ClaimDecision) -> str:
    """The verdict as a sentence's end: ``undecided (n = 6, would have seen 0.12)``."""
    if decision.verdict != "undecided":
        return f"{decision.verdict} (n = {decision.n})"
    if math.isinf(decision.detectable):
        return f"undecided (n = {decision.n})"
    return f"undecided (n = {decision.n}, would have seen {decision.detectable:.2g})"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

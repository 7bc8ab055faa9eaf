"""An excursion as it begins: its onset, its height, and its likely kind until more values come."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stabilitylab.spikes.baseline import Baseline
from stabilitylab.spikes.onsets import beginning_of
from stabilitylab.spikes.verdict import HARD_STEPS, Open, lasted


def at_value(
    base: Baseline,
    step: int,
    value: float,
    recent: Sequence[float],
    recent_steps: Sequence[int],
    inside: int | None,
) -> Open:
    """Begin an excursion at one value out; values right before it that stood half as high belong to it.

    Args:
        base: the signal's baseline.
        step: the step of ``value``.
        value: the value that is out.
        recent: the values before it, the latest last.
        recent_steps: the steps of the latest of them.
        inside: step of the last ordinary value.
    """
    residuals, steps = [value - base.level], [step]
    half = max(base.band(), 0.5 * base.limit()) if base.known else math.inf
    while len(steps) <= len(recent_steps) and recent[-len(steps)] - base.level > half:
        residuals.insert(0, recent[-len(steps)] - base.level)
        steps.insert(0, recent_steps[-len(steps)])
    onset = steps[0]
    inside = inside if inside is not None else step
    if len(steps) > 1:
        before = [s for s in recent_steps if s < onset]
        inside = before[-1] if before else onset
    height = max(residuals)
    return Open(
        kind="hard-batch" if lasted(step, inside, len(steps), even=base.even) <= HARD_STEPS else "spike",
        onset=onset,
        inside=inside,
        level=base.level,
        peak=steps[residuals.index(height)],
        height=height,
        end=step,
        told=step,
        out=len(steps),
        run=len(steps),
        age=len(steps),
        residuals=residuals,
    )


def at_mean(base: Baseline, step: int, values: Sequence[float], steps: Sequence[int]) -> Open:
    """Begin an excursion at a mean of ``values`` that is out, where they rose over a third of their largest."""
    residuals = [x - base.level for x in values]
    begin = beginning_of(residuals)
    top = max(range(begin, len(residuals)), key=residuals.__getitem__)
    return Open(
        kind="spike",
        onset=steps[begin],
        inside=steps[begin - 1] if begin else steps[0],
        level=base.level,
        peak=steps[top],
        height=residuals[top],
        end=step,
        told=step,
        out=max(HARD_STEPS + 1, len(steps) - begin),
        long_run=True,
        age=len(steps) - begin,
        residuals=residuals[begin:],
    )


def at_creep(base: Baseline, step: int, onset: int) -> Open:
    """Begin an excursion at a slow mean that has crept up from its lowest, which is the level that counts."""
    height, limit = base.slow - base.lowest, base.creep_limit()
    base.level = base.slow = base.lowest
    return Open(
        kind="divergence",
        onset=onset,
        inside=onset,
        level=base.level,
        peak=step,
        height=height,
        end=step,
        told=step,
        out=HARD_STEPS + 1,
        long_run=True,
        residuals=[height],
        crept_until=limit / 2,
    )

"""Episodes of a whole curve at once: the online detector, with its commonest path written out.

Nearly every value of a training log is ordinary. For those, ``find_episodes`` runs the recursions of
``baseline.py`` on local variables; everything else goes through the detector itself. Both paths do the same
operations in the same order, so the episodes are those of the online detector, to the last bit; a test holds
them to it. A million values take about half a second.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stabilitylab.errors import InputError
from stabilitylab.spikes.baseline import (
    BAND_SHARE,
    BAND_SIGMAS,
    FALL_SIGMAS,
    LEVEL_GAIN,
    PRIOR_WEIGHT,
    SECOND_DIFFERENCE,
    SIGMA_GAIN,
    UPWARD,
)
from stabilitylab.spikes.detector import SpikeDetector
from stabilitylab.spikes.episodes import Episode, episodes_of
from stabilitylab.spikes.excursion import BLOCK_VALUES
from stabilitylab.telemetry import LOSS, Event

# From so many values on no gain is larger than its steady value.
_FALL = 0.99 * FALL_SIGMAS / BAND_SIGMAS  # a little early, for the rounding
_STEADY_LEVEL = int(1 / LEVEL_GAIN)
_STEADY_SIGMA = int(2 / SIGMA_GAIN) - PRIOR_WEIGHT


def find_episodes(
    steps: ArrayLike | None, values: ArrayLike, *, signal: str = LOSS, finish: bool = True
) -> list[Episode]:
    """The episodes of one loss curve.

    Args:
        steps: whole numbers, one a value; None: 0, 1, 2, ...
        values: the losses; NaN and infinity are values that were seen.
        signal: the name the episodes carry.
        finish: the log ends here, so what is open is closed and judged.

    Raises:
        InputError: steps and values differ in length, or are not one-dimensional.
    """
    values_N = np.asarray(values, dtype=np.float64)
    steps_N = np.arange(len(values_N)) if steps is None else np.asarray(steps)
    if values_N.ndim != 1 or steps_N.shape != values_N.shape:
        raise InputError(
            f"steps and values must be lists of one length, got shapes {steps_N.shape}, {values_N.shape}"
        )
    detector = SpikeDetector(loss=signal)
    events = feed_losses(detector, steps_N.astype(np.int64), values_N)
    if finish:
        events += detector.finish()
    return episodes_of(events)


def feed_losses(
    detector: SpikeDetector, steps_N: NDArray[np.int64], values_N: NDArray[np.float64]
) -> list[Event]:
    """``detector.update`` for each loss in turn; the detector must not have been given other signals."""
    if not len(values_N):
        return []
    curve = _Curve(steps_N, values_N)
    events: list[Event] = []
    at = 0
    while at < len(curve.values):
        at = _ordinary(detector, curve, at, events)
        if at < len(curve.values):
            events += detector.update(int(curve.steps[at]), {detector.loss: curve.values[at]})
            at += 1
    return events


class _Curve:
    """A curve as lists, for speed in a Python loop, with what can be computed ahead."""

    def __init__(self, steps_N: NDArray[np.int64], values_N: NDArray[np.float64]) -> None:
        self.steps = steps_N
        self.values: list[float] = values_N.tolist()
        bends_N = np.zeros_like(values_N)
        with np.errstate(invalid="ignore", over="ignore"):
            bends_N[2:] = SECOND_DIFFERENCE * np.abs(values_N[2:] - 2 * values_N[1:-1] + values_N[:-2])
        self.bends: list[float] = bends_N.tolist()
        # Where the gap between steps changes, or a value is not finite, the detector itself has to look.
        gaps_N = np.diff(steps_N, prepend=steps_N[0] - 1)
        self.gaps = gaps_N
        odd_N = ~np.isfinite(values_N)
        odd_N[1:] |= gaps_N[1:] != gaps_N[:-1]
        self.odd: list[int] = [*np.flatnonzero(odd_N).tolist(), len(values_N)]


def _ordinary(detector: SpikeDetector, curve: _Curve, at: int, events: list[Event]) -> int:
    """Take ordinary values in from ``at`` on; returns the index of the first that needs the detector's own
    attention."""
    loss = detector.loss_excursions
    base = loss.baseline
    values, bends = curve.values, curve.bends
    if (
        at < 2
        or base.count < _STEADY_LEVEL
        or base.learned < _STEADY_SIGMA
        or base.absolute_floor > 0.0
        or loss.open is not None
        or loss.fresh
        or loss.doubtful
        or detector.has_burst
        or curve.gaps[at] != loss.interval
        or base.previous != values[at - 1]
        or base.before_previous != values[at - 2]
    ):
        return at
    end = curve.odd[bisect_left(curve.odd, at)]
    level, difference, upward = base.level, base.difference_sigma, base.upward_sigma
    share = BAND_SHARE * base.relative_floor
    while at < end:
        first, spread = at, base.spread
        stop = min(end, at + BLOCK_VALUES - loss.since_block)
        for value, bend in zip(values[at:stop], bends[at:stop], strict=True):
            residual = value - level
            clip = BAND_SIGMAS * (difference if difference > upward else upward)
            if residual > clip and residual > clip * spread and residual > share * abs(level):
                break
            if bend > clip:
                if level - values[at - 1] > _FALL * clip:  # perhaps a jump on a fall: for the detector to say
                    break
                bend = clip
            level += LEVEL_GAIN * residual
            if residual > 0.0:
                up = UPWARD * residual
                if up > 2 * clip:
                    up = 2 * clip
                upward += SIGMA_GAIN * (up - upward)
            else:
                upward -= SIGMA_GAIN * upward
            difference += SIGMA_GAIN * (bend - difference)
            at += 1
        if at == first:
            break
        base.level, base.difference_sigma, base.upward_sigma = level, difference, upward
        base.before_previous, base.previous = values[at - 2], values[at - 1]
        base.count += at - first
        base.learned += at - first
        step = loss.last_step = loss.inside = int(curve.steps[at - 1])
        loss.since_block += at - first
        if loss.since_block == BLOCK_VALUES and (changes := loss.end_block(step)):
            events += detector.tell(step, changes)
            break
        if at < stop:
            break
    return at

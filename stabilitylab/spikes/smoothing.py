"""Notices logs that were smoothed before they were written, and undoes the smoothing.

Many trainers log an exponential mean y_t = a y_{t-1} + (1 - a) x_t instead of the loss x. A hard batch then rises at once, decays
by the factor a per value, and looks like a spike of the run's state. Undone,

    x_t = (y_t - a y_{t-1}) / (1 - a)

it is one value again. The factor is the slope of u_t on u_{t-1}, u the log about a running median, by least absolute deviations (a
weighted median of u_t / u_{t-1}): hard batches decay by exactly a and weigh most. Correlated noise alone is no smoothing, and
undoing it would be wrong. A log counts as smoothed only if a is at least .5, its quiet values are correlated by nearly as much, and
the undone values show it: at least eight stand alone, ten deviations high, few stand as far below (one does where a plateau ends),
and most excursions of the log begin at such values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stabilitylab.spikes.baseline import MAD
from stabilitylab.spikes.bumps import running_median
from stabilitylab.spikes.episodes import Episode

LEAST_FACTOR, MOST_FACTOR = 0.5, 0.995
LEAST_VALUES = 128
ALONE_SIGMAS = 10.0
LEAST_ALONE = 8
EXPLAINED = 2 / 3
HALF = 100
LEAST_CORRELATION = 0.6

Vector = NDArray[np.float64]


def smoothing_factor(
    steps_N: NDArray[np.int64], values_N: Vector, episodes: Sequence[Episode]
) -> float | None:
    """The factor a of a smoothed log; None for one that is not.

    Args:
        steps_N: strictly rising.
        values_N: finite.
        episodes: the episodes of the log as it is.
    """
    spikes = [
        one
        for one in episodes
        if one.kind in ("spike", "divergence", "hard-batch") and one.height is not None
    ]
    if len(values_N) < LEAST_VALUES or not spikes:
        return None
    about_N = values_N - running_median(values_N, min(HALF, len(values_N) // 4))
    before_N, after_N = about_N[:-1], about_N[1:]
    weight_N = np.abs(before_N)
    there_N = weight_N > 0
    if not there_N.any():
        return None
    slopes_N, weight_N = after_N[there_N] / before_N[there_N], weight_N[there_N]
    order = np.argsort(slopes_N)
    factor = float(slopes_N[order][np.searchsorted(np.cumsum(weight_N[order]), weight_N.sum() / 2)])
    if not LEAST_FACTOR <= factor <= MOST_FACTOR:
        return None
    # The noise between the excursions must be smooth, too.
    quiet_N = np.abs(about_N) <= 3 * MAD * np.median(np.abs(about_N))
    pairs_N = quiet_N[:-1] & quiet_N[1:]
    power = float((before_N[pairs_N] ** 2).sum())
    if float((before_N[pairs_N] * after_N[pairs_N]).sum()) < LEAST_CORRELATION * factor * power:
        return None
    raw_N = undone(values_N, factor)
    residual_N = raw_N - running_median(raw_N, 10)
    scale = MAD * float(np.median(np.abs(residual_N)))
    alone_N = residual_N > ALONE_SIGMAS * scale
    low = int((residual_N < -ALONE_SIGMAS * scale).sum())
    neighbours_N = np.roll(alone_N, 1) | np.roll(alone_N, -1)
    alone_N &= ~neighbours_N
    count = int(alone_N.sum())
    if count < LEAST_ALONE or low > 0.2 * count:
        return None
    at = np.flatnonzero(alone_N)
    begun = [int(np.searchsorted(steps_N, one.onset)) for one in spikes]
    explained = sum(bool(np.abs(at - i).min() <= 3) for i in begun)
    return factor if explained >= EXPLAINED * len(begun) else None


def undone(values_N: Vector, factor: float) -> Vector:
    """The values before the exponential mean; the first stays as it is."""
    raw_N = values_N.copy()
    raw_N[1:] = (values_N[1:] - factor * values_N[:-1]) / (1 - factor)
    return raw_N

"""Rises that stay up, seen from the end of a log.

*Steps up for good*: the median of the next w values exceeds that of the last w by 7 deviations of that difference and by 1.2 % of
the level, and all that follows is at least half as high.

*Slow rises*: of the medians of 48 blocks the last ones stand over the lowest by 8 % and 8 deviations. A level that has crossed the
middle of the rise more than once is a wave, not a rise.

A rise that stands, in the last quarter, at less than half of its height is on its way back, and no divergence.
"""

from __future__ import annotations

import math

import numpy as np

from stabilitylab.spikes import baseline
from stabilitylab.spikes.baseline import MAD
from stabilitylab.spikes.bumps import (
    BumpSpan,
    Vector,
    centred_median,
    correlation,
    quantum_of,
    ripple,
    running_median,
    sample,
)
from stabilitylab.spikes.series import rolling_median

STEP_FLOOR = 0.012
RISE_FLOOR = 0.08
RISE_SIGMAS = 8.0
BLOCKS = 48


def step_up(values_N: Vector) -> BumpSpan | None:
    """The step up for good, from its first value to the end; None where there is none."""
    n = len(values_N)
    w = int(np.clip(n // 6, 5, 16))
    if n < 4 * w:
        return None
    trailing_N = rolling_median(values_N, w - 1)
    before_N, after_N = trailing_N[w - 1 : n - w], trailing_N[2 * w - 1 :]  # of a step at index w, w + 1, ...
    rise_N = after_N - before_N
    # A median of w values scatters 1.25 times a mean of as many; two are compared, and correlated neighbours count less.
    some_N = sample(values_N)
    residual_N = some_N - running_median(some_N, max(w, 16))
    single = max(MAD * float(np.median(np.abs(residual_N))), ripple(some_N), quantum_of(values_N))
    scale = 1.25 * math.sqrt(2 / w) * single * _inflation(residual_N, single)
    at = int(rise_N.argmax())
    rise, level = float(rise_N[at]), float(before_N[at])
    first = at + w
    if rise <= max(baseline.LIMIT_SIGMAS * (1 + 16 / n) * scale, STEP_FLOOR * abs(level)):
        return None
    # A rise out of a dip only comes back: the level before the dip counts.
    dip = rise_N[max(0, at - 2 * w) : at].min(initial=0.0)
    begin = max(0, first - 4 * w)
    earlier, earliest = (float(np.median(values_N[begin:end])) for end in (first, begin + w))
    if dip < -0.5 * rise and earlier > level + 0.5 * rise and earliest < level + 1.5 * rise:
        return None
    rest = values_N[first:]
    later = rolling_median(rest, w - 1)[w - 1 :]
    if later.min(initial=math.inf) < level + 0.5 * rise:
        return None
    # The largest difference is flat over a few places: the step is where the values themselves rise.
    near = range(max(1, first - w // 2), min(n - 1, first + w // 2))
    first = max(near, key=lambda i: values_N[i : i + 3].min() - values_N[max(0, i - 3) : i].max())
    return first, n - 1, "divergence"


def slow_rise(values_N: Vector) -> BumpSpan | None:
    """The slow rise, from where it begins to the end; None where there is none."""
    n = len(values_N)
    width = max(4, n // BLOCKS)
    count = n // width
    if count < 8:
        return None
    blocks_B = np.median(values_N[n - count * width :].reshape(count, width), axis=1)
    smooth_B = centred_median(blocks_B, 3)
    bends = np.abs(np.diff(blocks_B, 2)) / math.sqrt(6)
    scale = max(MAD * float(np.median(bends)), quantum_of(values_N))
    lowest = int(smooth_B.argmin())
    low, last = float(smooth_B[lowest]), float(np.median(blocks_B[-3:]))
    rise = last - low
    if rise <= max(RISE_FLOOR * abs(low), RISE_SIGMAS * scale) or count - lowest < 4:
        return None
    over_B = smooth_B[int(np.argmax(smooth_B < low + 0.5 * rise)) :] > low + 0.5 * rise
    if int((np.diff(over_B.astype(int)) == 1).sum()) > 1:
        return None
    quiet = np.flatnonzero(smooth_B[: count - 1] <= low + max(0.15 * rise, scale))
    first = n - count * width + (int(quiet[-1]) + 1) * width
    return min(first, n - 1), n - 1, "divergence"


def is_recovering(values_N: Vector, first: int) -> bool:
    """Whether the last quarter from ``first`` on stands at less than half of the highest third, and so is on its way back."""
    level = float(np.median(values_N[max(0, first - 16) : first])) if first else float(values_N[0])
    rest_N = values_N[first:] - level
    if len(rest_N) < 9:
        return False
    highest = max(float(np.median(third)) for third in np.array_split(rest_N, 3))
    return float(np.median(rest_N[-(len(rest_N) // 4) :])) < 0.5 * highest


def jumps(values_N: Vector, at: int) -> bool:
    """Whether a value stands out of the eight before it, so that the rise does not begin slowly."""
    before_N = values_N[max(0, at - 8) : at]
    if len(before_N) < 4 or at >= len(values_N):
        return False
    middle = float(np.median(before_N))
    return float(values_N[at]) - middle > 5 * MAD * float(np.median(np.abs(before_N - middle)))


def _inflation(residual_N: Vector, scale: float) -> float:
    """How much more a mean of many values scatters, as neighbours are correlated: sqrt((1 + rho) / (1 - rho))."""
    rho = correlation(residual_N, scale)
    return math.sqrt((1 + rho) / (1 - rho))

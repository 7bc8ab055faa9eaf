"""What begins an excursion: the questions that a quiet signal's next value is asked.

A value, a mean of four or of a block over its limit; on a fall, where the level lags behind, a value or a mean of four
that stands as high above the values right before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from stabilitylab.spikes import baseline as constants
from stabilitylab.spikes.baseline import BLOCK, FALL_SIGMAS, GROUP, Baseline, ripple_of


def is_above_noise(base: Baseline, recent: Sequence[float], height: float, values: int) -> bool:
    """Whether a mean of ``values`` so high stands out of the noise of the last 32 values, which may have grown."""
    k = base.factor ** (2 if values == 1 else 1)
    return bool(height > constants.LIMIT_SIGMAS * k * ripple_of(recent) / values**0.5)


def is_out(base: Baseline, recent: Sequence[float], residual: float) -> bool:
    """Whether one value is over its limit."""
    return residual > base.limit() and is_above_noise(base, recent, residual, 1)


def has_jumped(base: Baseline, recent: Sequence[float], value: float) -> bool:
    """On a fall the level lags: whether ``value`` stands over the limit above the last four values instead.

    They count when all lie 2 sigma under the level, as four neighbours do once in 4 million in noise without a trend.
    """
    if len(recent) < GROUP:
        return False
    top = max(recent[-1], recent[-2], recent[-3], recent[-4])
    rise = value - top
    if base.level - top <= FALL_SIGMAS * base.sigma or rise <= base.limit():
        return False
    return is_above_noise(base, recent, rise, 1)


def four_are_out(base: Baseline, recent: Sequence[float], residual: float) -> bool:
    """Whether the mean of the last four residuals is over its limit; on a fall, above the four and eight before."""
    if residual <= -base.band() or len(recent) < 3 * GROUP:
        return False
    limit = base.limit_of_four()
    clip = max(3 * base.sigma * base.factor, 1.25 * limit)
    last = [recent[i] - base.level for i in range(1 - 3 * GROUP, 0)]
    mean = (min(residual, clip) + sum(min(r, clip) for r in last[1 - GROUP :])) / GROUP
    if mean <= limit:
        earlier = [max(r, -clip) for r in last[: 2 * GROUP]]
        reference = max(sum(earlier[:GROUP]), sum(earlier[GROUP:])) / GROUP
        mean -= min(0.0, reference)
    return mean > limit and is_above_noise(base, recent, mean, GROUP)


def block_is_out(base: Baseline, recent: Sequence[float], block: Sequence[float]) -> bool:
    """Whether the mean of a block of values is over its limit."""
    clip = max(3 * base.sigma * base.factor, 1.5 * base.limit_of_block())
    mean = sum(min(x - base.level, clip) for x in block) / len(block)
    return mean > base.limit_of_block() and is_above_noise(base, recent, mean, BLOCK)


def beginning_of(residuals: Sequence[float]) -> int:
    """Where an excursion of means began: the values behind the mean rose over a third of their largest."""
    begin = 0
    for i, r in enumerate(residuals):
        if r <= 0.3 * max(residuals):
            begin = i + 1
        elif i >= len(residuals) - GROUP:
            break
    return min(begin, len(residuals) - 1)

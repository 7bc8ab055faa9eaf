"""Running levels of many sites at once: each one's own baseline, in one pass over the steps.

For the logarithm y of a site's positive statistic

    level += g (y - level)        d += g (|y - level| - d)        g = 1/8

from the ``LEAST``-th value on with deviations clipped at 4 d, so that a departure neither drags its level along nor widens it at
once. Each step takes a few vector operations, whatever the number of sites.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GAIN = 1 / 8
LEAST = 16
_CLIP = 4.0
_QUIETEST = 0.02

Array = NDArray[np.float64]


class SiteLevels:
    """Level and mean deviation of each of ``count`` sites."""

    def __init__(self, count: int) -> None:
        self.level, self.deviation = np.zeros(count), np.zeros(count)
        self.seen = np.zeros(count, dtype=np.int64)

    def rise(self, values: Array) -> Array:
        """How far each site's logarithm is above its level, -inf where that is unknown; then learn from the values.

        Args:
            values: one per site; ``rise`` passes over those not finite or not positive.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            y = np.log(np.abs(values))
        here, known = np.isfinite(y), self.seen >= LEAST
        apart = np.where(here, y - self.level, 0.0)
        rise = np.where(here & known, apart, -np.inf)
        bound = np.where(known, _CLIP * np.maximum(self.deviation, _QUIETEST), np.inf)
        apart = np.clip(apart, -bound, bound)
        # The first values make the level, later ones move it.
        gain = np.maximum(GAIN, 1.0 / (self.seen + 1.0))
        self.level += gain * apart
        self.deviation += np.where(here & (self.seen > 0), gain * (np.abs(apart) - self.deviation), 0.0)
        self.seen += here
        return rise

"""A power law through a quantity's recent past, and how far such laws have been off in this very run.

    log y(t) = log y(T) + b log(t / T) + e             fitted by least squares to the steps from T / 4 to T, the last

A power law, because what grows in training grows ever slower per step (norms as a power of the step, 2203.03466's coordinate
checks; weights under AdamW until their equilibrium). In log t the past is like the future, so the run itself says how far to trust
a slope. The same fit at T / 2 gives a slope f, to compare with the slope a that led to the level at T. Growth that levels off, and
slopes that were noise, show in the share of f that came true, over all sites:

    c = sum a f / sum f^2, kept within 0 and 1        b <- c b        w = the 90 % quantile of |a - c f|

The band is every law whose slope lies within b - w and b + w, and a limit L is reached between

    T (L / y(T))^(1 / (b + w))   and   T (L / y(T))^(1 / (b - w)),       never, where that slope is not positive.

Assumption: from T on slopes err as they did from T / 2 to T. The law does not know of a coming change of the recipe (a decay of the
rate, other data). It holds for as long ahead as the past is long, in log t: to some 4 T; beyond, it is no forecast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

# A fit takes this many measurements at least, and its past reaches back to this share of the last step.
FEWEST, PAST = 4, 0.25
COVERED = 0.9
_FLOOR = 1e-12
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Trend:
    """The law of one site.

    Attributes:
        last: the step T up to which it was seen.
        level: y(T), of the fitted line.
        slope: b, shrunk to the share of it that came true.
        width: w, of all sites together.
    """

    last: int
    level: float
    slope: float
    width: float

    def reaches(self, limit: float) -> tuple[float, float, float]:
        """Steps at which the limit is reached: earliest, most likely, latest; infinite for never."""
        if self.level >= limit:
            return (float(self.last),) * 3
        gap = math.log(limit / max(self.level, _FLOOR))

        def when(slope: float) -> float:
            power = gap / slope if slope > 0 else math.inf
            return self.last * math.exp(power) if power < 50 else math.inf

        return when(self.slope + self.width), when(self.slope), when(self.slope - self.width)


def trends(values: pd.DataFrame) -> dict[str, Trend]:
    """The law of every site that has one.

    Args:
        values: rows the sites, columns the steps; NaN where there is none. What is not finite or 0 is left out.

    Returns:
        By site. A site with fewer than ``FEWEST`` measurements from T / 4 on has none; no site has one where none can be checked at
        half the steps.
    """
    steps = np.asarray(values.columns, dtype=np.float64) + 1.0
    if not len(steps):
        return {}
    last = float(steps[-1])
    fits, foretold, came = {}, [], []
    for site, row in zip(values.index, values.to_numpy(dtype=np.float64), strict=True):
        whole = _fit(steps, row, last)
        if whole is None:
            continue
        fits[str(site)] = whole
        half = _fit(steps, row, last / 2)
        if half is not None:
            foretold.append(half[1])
            came.append((whole[0] - half[0]) / math.log(2.0))
    if not foretold:
        return {}
    f, a = np.array(foretold), np.array(came)
    true = float(np.clip(np.dot(a, f) / np.dot(f, f), 0.0, 1.0)) if np.dot(f, f) > 0 else 0.0
    width = float(np.quantile(np.abs(a - true * f), COVERED))
    return {
        site: Trend(last=int(last) - 1, level=math.exp(level), slope=true * slope, width=width)
        for site, (level, slope) in fits.items()
    }


def _fit(steps: Array, row: Array, end: float) -> tuple[float, float] | None:
    """Log level at ``end``, and slope over log steps."""
    used = (steps <= end) & (steps >= PAST * end) & np.isfinite(row) & (row > _FLOOR)
    if used.sum() < FEWEST or float(np.ptp(steps[used])) == 0:
        return None
    x, y = np.log(steps[used] / end), np.log(row[used])
    slope = float(np.dot(x - x.mean(), y - y.mean()) / np.dot(x - x.mean(), x - x.mean()))
    return float(y.mean() - slope * x.mean()), slope

"""The largest magnitudes: quantiles from a histogram, and channels that stand out.

``summary`` keeps the tail of |x| as counts in bins of an eighth of an octave: narrow enough to place a quantile to within 12.5 %
whatever the distribution, and only a few hundred integers per site. Counts add up exactly over micro-batches and ranks, which
quantiles do not.

Inside a bin the module assumes a Pareto tail: the number N of elements from x on falls as a power of x, through its known values at
the bin's edges; the last bin ends at the maximum, which one element reaches. This is exact for power-law tails and off by a
second-order term for others: with h = 1/8 the width of a bin relative to x and a = -d log N / d log x, the error of log x is at
most |da/d log x| h^2 / (8 a): 0.4 % for a Gaussian at any height (there da/d log x = 2a). Where few elements share a bin, chance
remains: about 1/(2 a sqrt(r)) at the r-th largest element. Magnitudes of 2^16 and more share the last bin.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# 8 bins to the octave from 2^-24 up to 2^16; values outside count in the first or last bin.
TAIL_BINS = 320
TAIL_SHIFT = 20
TAIL_FIRST = (127 - 24) << 3

TAIL_SHARES = (1e-3, 1e-4, 1e-5, 1e-6)

# Lower edges of the bins, from the bits of a float32, and the upper edge of the last.
EDGES = (
    ((np.arange(TAIL_BINS + 1) + TAIL_FIRST).astype(np.uint32) << TAIL_SHIFT)
    .view(np.float32)
    .astype(np.float64)
)


def tail_quantiles(tail: NDArray[np.integer], count: Array, absmax: Array, tail_from: Array) -> Array:
    """The magnitudes exceeded by a share of ``TAIL_SHARES`` of all elements, [sites, shares].

    Args:
        tail: counts [sites, TAIL_BINS].
        count: elements of each site; with fewer than 1/share of them the quantile is the maximum.
        absmax: largest magnitude; where it is NaN so are the quantiles.
        tail_from: edge of a bin, from which the histogram is complete; a quantile below it is unknown, NaN.
    """
    sites = np.arange(len(tail))
    above = np.zeros((len(tail), TAIL_BINS + 1))  # elements in this bin or higher
    above[:, :-1] = np.cumsum(tail[:, ::-1], axis=1)[:, ::-1]
    quantiles = []
    for share in TAIL_SHARES:
        rank = share * count
        # The bin that holds the element of this rank: the highest with at least as many in it or above.
        bin_ = np.maximum(np.sum(above[:, :-1] >= np.maximum(rank, 1.0)[:, None], axis=1) - 1, 0)
        low, high = above[sites, bin_], above[sites, bin_ + 1]
        ends_here = high < 1.0
        # N at the bin's ends, and the ends: the edges, or the maximum, with one element.
        last = np.where(ends_here, np.fmax(absmax, EDGES[bin_]), EDGES[bin_ + 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            fall = np.log(low / np.maximum(rank, 1.0)) / np.log(low / np.maximum(high, 1.0))
            part = np.where(np.isfinite(fall), np.clip(fall, 0.0, 1.0), 1.0)
            value = EDGES[bin_] * (last / EDGES[bin_]) ** part
        value = np.where(rank <= 1.0, absmax, np.minimum(value, absmax))
        known = ~np.isnan(absmax) & (EDGES[bin_] >= np.where(tail_from <= EDGES[0], 0.0, tail_from))
        quantiles.append(np.where(known, value, np.nan))
    return np.stack(quantiles, axis=1)


def max_over_median(largest_SC: Array) -> Array:
    """The largest channel's maximum over the median channel's, [sites]: 1 where all are alike."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.max(largest_SC, axis=1) / np.median(largest_SC, axis=1))


def channel_kurtosis(square_SC: Array) -> Array:
    """mean(s^4)/mean(s^2)^2 over channels, s the RMS of a channel: 1 if all carry alike, C if one carries all.

    Source: He et al., arXiv:2405.19279, section 2. Only the ratios of ``square_SC`` [sites, channels] matter.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.mean(square_SC**2, axis=1) / np.mean(square_SC, axis=1) ** 2)

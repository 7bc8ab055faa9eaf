"""Spike score: the share of values that stand far out of their neighbourhood.

OLMo 2 (2501.00656, section 3.1) counts the values at least 7 standard deviations from the rolling mean of the last 1,000:

    score = (1/N) |{t : |x_t - mean(x_{t-W..t-1})| >= k std(x_{t-W..t-1})}|        W = 1000, k = 7

The window excludes the current value here; otherwise a window of W values could reach at most (W - 1)/sqrt(W) deviations, and short
windows could count none. Windows are shorter at the start, but have at least ``MINIMUM`` values.

On a falling curve the trend inflates the deviation and hides spikes. ``detrend=True`` scores the residuals over a running median of
the last 31 values instead, which a straight trend passes and a spike of fewer than 16 does not move; the rolling mean absorbs the
constant offset from the lag. Both count hard batches too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stabilitylab.spikes.series import far_out, rolling_median

WINDOW = 1000
SIGMAS = 7.0
MINIMUM = 32
MEDIAN_WINDOW = 31


def spike_score(
    values: ArrayLike, *, window: int = WINDOW, sigmas: float = SIGMAS, detrend: bool = False
) -> float:
    """The share of finite values that are spikes; NaN for a curve without finite values.

    Args:
        values: one curve, in order. Non-finite values are left out.
        window: values in the rolling window, the current one excluded.
        sigmas: how many standard deviations make a spike.
        detrend: score the residuals over a running median instead of the values.
    """
    score = SpikeScore(window=window, sigmas=sigmas, detrend=detrend)
    score.add(np.asarray(values, dtype=np.float64))
    return score.value


class SpikeScore:
    """The spike score of a curve that comes in pieces; memory does not grow with its length."""

    def __init__(self, *, window: int = WINDOW, sigmas: float = SIGMAS, detrend: bool = False) -> None:
        self.window = window
        self.sigmas = sigmas
        self.detrend = detrend
        self.count = 0
        self.spikes = 0
        self._tail = np.empty(0)

    def add(self, values_N: NDArray[np.float64]) -> None:
        """Take the next piece in."""
        values_N = values_N[np.isfinite(values_N)]
        joined_N = np.concatenate([self._tail, values_N])
        self.count += len(values_N)
        self.spikes += int(self._spikes(joined_N)[len(self._tail) :].sum())
        self._tail = joined_N[-(self.window + MEDIAN_WINDOW) :]

    @property
    def value(self) -> float:
        return self.spikes / self.count if self.count else float("nan")

    def _spikes(self, values_N: NDArray[np.float64]) -> NDArray[np.bool_]:
        x_N = values_N
        if self.detrend and len(x_N):
            before_N = np.concatenate([x_N[:1], rolling_median(x_N, MEDIAN_WINDOW - 1)[:-1]])
            x_N = x_N - before_N
        # A window of equal values has a deviation of rounding errors: nothing that small counts.
        return far_out(x_N, self.window, min(MINIMUM, self.window), self.sigmas, values_N)

"""Differences between arms, seed by seed, with the uncertainty that so few seeds leave.

For seeds i = 1..n that both arms ran, d_i = metric(a, i) - metric(b, i). The mean of d has the paired t interval

    mean(d) +- t(0.975, n - 1) sd(d) / sqrt(n)

(Student 1908; scipy.stats). With two seeds t is 12.7, so an interval that excludes zero is rare and an honest table
mostly says "both seeds agree" rather than "proved". Non-finite values are kept: a metric that is infinite or NaN in one
arm (a run that diverged) has no interval, and the comparison says so.

Of ratios measured many times the median has a bootstrap interval (Efron 1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """a - b over shared seeds.

    Attributes:
        seeds: those that both arms have.
        differences: one a seed, in the metric's unit.
        mean: their mean.
        low, high: the 95 % interval; infinite with fewer than two seeds or a non-finite difference.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    low: float
    high: float

    @property
    def signs_agree(self) -> bool:
        """Whether every seed's difference points the same way."""
        signs = {np.sign(d) for d in self.differences}
        return len(signs) == 1 and signs <= {-1.0, 1.0}


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> PairedDifference:
    """Compare two arms' values by seed."""
    seeds = tuple(sorted(a.keys() & b.keys()))
    differences = tuple(_difference(a[seed], b[seed]) for seed in seeds)
    n = len(differences)
    mean = float(np.mean(differences)) if n else math.nan
    if n < 2 or not all(math.isfinite(d) for d in differences):
        return PairedDifference(seeds=seeds, differences=differences, mean=mean, low=-math.inf, high=math.inf)
    half = float(stats.t.ppf(0.975, n - 1)) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return PairedDifference(
        seeds=seeds, differences=differences, mean=mean, low=mean - half, high=mean + half
    )


def _difference(a: float, b: float) -> float:
    # inf - inf: both diverged the same way, which is no difference either way.
    return 0.0 if a == b else a - b


def median_interval(ratios: np.ndarray) -> tuple[float, float]:
    """Holds the median of ``ratios`` [restarts, rounds] with 95 %: percentiles of the medians of 2,000 resamples, of
    restarts and of each one's rounds."""
    dice, (restarts, rounds) = np.random.default_rng(0), ratios.shape
    lives = dice.integers(restarts, size=(2000, restarts, 1))
    drawn = ratios[lives, dice.integers(rounds, size=(2000, restarts, rounds))]
    low, high = np.percentile(np.median(drawn, axis=(1, 2)), (2.5, 97.5))
    return float(low), float(high)

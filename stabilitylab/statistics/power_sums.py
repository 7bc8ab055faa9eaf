"""Mean, RMS, variance and kurtosis from power sums.

The sums of powers about zero, S_k = sum x^k, k = 1..4, in float64, describe a tensor. Power sums of parts add up to those of the
whole, so micro-batches and ranks merge exactly, and the rest follows:

    mean = S1/n    RMS = sqrt(S2/n)    var = S2/n - mean^2
    m4   = (S4 - 4 mean S3 + 6 mean^2 S2)/n - 3 mean^4
    kurtosis = m4 / var^2              (3 for a Gaussian: Pearson's definition, scipy.stats.kurtosis(fisher=False))

m4 is a difference of terms of size mean^4 and loses log2((mean/std)^4) of float64's 53 bits: three digits remain up to |mean|/std
of about 1,000.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean(count: Array, s1: Array) -> Array:
    """S1/n; NaN for an empty tensor."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(s1 / count)


def rms(count: Array, s2: Array) -> Array:
    """sqrt(S2/n); NaN for an empty tensor."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(s2 / count))


def variance(count: Array, s1: Array, s2: Array) -> Array:
    """Population variance, clipped at zero where rounding would make it negative."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(np.maximum(s2 / count - (s1 / count) ** 2, 0.0))


def kurtosis(count: Array, s1: Array, s2: Array, s3: Array, s4: Array) -> Array:
    """Pearson's kurtosis m4/m2^2 (Gaussian: 3); NaN for a constant or empty tensor."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mu = s1 / count
        m2 = np.maximum(s2 / count - mu**2, 0.0)
        m4 = (s4 - 4 * mu * s3 + 6 * mu**2 * s2) / count - 3 * mu**4
        return np.asarray(np.where(m2 > 0, m4 / m2**2, np.where(np.isnan(m2), m2, np.nan)))

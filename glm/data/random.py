"""Random numbers that are functions: of (seed, sample, draw), for whole arrays of samples at once.

    bits(seed, i, j) = mix(mix(seed + i g) + j g'),   mix = the finaliser of SplitMix64

so that sample i is the same whichever worker builds it, in whatever order, before or after a resume. ``shuffled`` is a permutation
of 0..n-1 in O(1) memory: a four-round Feistel network on the next even power of two, walked until it falls inside (Black and
Rogaway 2002, "Ciphers with arbitrary finite domains").

Source of the finaliser's constants: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014). Limits: not for
cryptography; 2^-64 bias in ``uniform``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SECOND = np.uint64(0xD1B54A32D192ED03)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def bits(seed: int, sample: ArrayLike, draw: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each (sample, draw), broadcast together."""
    with np.errstate(over="ignore"):
        key = _mix(np.asarray(sample, np.uint64) * _GOLDEN + _mix(np.asarray([seed], np.uint64) + _GOLDEN))
        return _mix(key + np.asarray(draw, np.uint64) * _SECOND)


def uniform(seed: int, sample: ArrayLike, draw: ArrayLike) -> NDArray[np.float64]:
    """Uniform in [0, 1) for each (sample, draw), broadcast together."""
    return (bits(seed, sample, draw) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled(seed: int, index: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Where a random permutation of ``range(size)``, chosen by the seed, puts each index."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        walking = value[outside]
        left, right = walking >> shift, walking & mask
        for round_ in range(4):
            left, right = right, left ^ (bits(seed, right, round_) & mask)
        value[outside] = (left << shift) | right
        outside = value >= size
    return value.astype(np.int64)

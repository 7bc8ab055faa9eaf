"""ZClip bounds the global gradient norm by its past (2504.02507).

It clips a norm z > 2.5 deviations above the exponential mean of earlier ones to mean + 2.5^2 / z deviations. The optimizer never
passes it a norm that is not finite, which would spoil the past for good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DECAY = 0.97
DEVIATIONS = 2.5
WARMUP = 25


class ZClip:
    """Mean and variance of past norms, and the bound from them."""

    def __init__(self) -> None:
        self._mean = self._variance = 0.0
        self._seen = 0

    def bound(self, norm: float) -> float:
        """The bound of this norm; infinite: none."""
        deviation = math.sqrt(self._variance)
        if self._seen < WARMUP or deviation == 0.0:
            return math.inf
        z = (norm - self._mean) / deviation
        return math.inf if z <= DEVIATIONS else self._mean + DEVIATIONS**2 / z * deviation

    def remember(self, norm: float) -> None:
        """Take a norm, after clipping, into the past."""
        gain = max(1 - DECAY, 1 / (self._seen + 1))
        difference = norm - self._mean
        self._mean += gain * difference
        self._variance = (1 - gain) * (self._variance + gain * difference**2)
        self._seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"norm_mean": self._mean, "norm_variance": self._variance, "norms_seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean, self._variance = state["norm_mean"], state["norm_variance"]
        self._seen = state["norms_seen"]

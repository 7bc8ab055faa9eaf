"""ZClip: the bound of the global gradient norm follows its past (2504.02507).

A norm z > 2.5 deviations above the exponential mean of those before is clipped to mean + 2.5^2 / z deviations. A norm that is not
finite is never given to it, so that it cannot end the past for good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DECAY = 0.97
DEVIATIONS = 2.5
WARMUP = 25


class ZClip:
    """Mean and variance of past norms, and what they bound."""

    def __init__(self) -> None:
        self._mean = self._variance = 0.0
        self._seen = 0

    def bound(self, norm: float) -> float:
        """What this norm is clipped to; infinite: it is not."""
        deviation = math.sqrt(self._variance)
        if self._seen < WARMUP or deviation == 0.0:
            return math.inf
        z = (norm - self._mean) / deviation
        return math.inf if z <= DEVIATIONS else self._mean + DEVIATIONS**2 / z * deviation

    def remember(self, norm: float) -> None:
        """Take a norm, as it was clipped, into the past."""
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

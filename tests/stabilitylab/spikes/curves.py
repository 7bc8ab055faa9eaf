"""Synthetic loss curves with known events, for the tests of the detector."""

import numpy as np


def falling(
    n: int, seed: int = 0, *, start: float = 9.0, end: float = 2.5, pace: float = 150.0, noise: float = 0.03
):
    """A loss curve: exponential fall, then a slow power law, and Gaussian noise."""
    t = np.arange(n)
    trend = end + (start - end) * (0.8 * np.exp(-t / pace) + 0.2 / np.sqrt(1 + t / pace))
    return trend + noise * np.random.default_rng(seed).standard_normal(n)


def bump(curve: np.ndarray, at: int, height: float, decay: float = 10.0) -> None:
    """A state spike: a jump that decays."""
    t = np.arange(len(curve) - at)
    curve[at:] += height * np.exp(-t / decay)

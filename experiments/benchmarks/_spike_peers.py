"""Other projects' spike detectors, each reimplemented from its description, as rules on a curve of losses.

A rule says for every value whether the detector would have flagged it when it came. Rules made for gradient norms (ZClip) here
apply to the loss, the signal that every log has.

| rule | source |
| --- | --- |
| olmo_core | SkipStepOptimizer: window 128, 6 standard deviations, current value excluded, from 64 values on |
| olmo2_score | spike score of OLMo 2 (2501.00656, section 3.1): 7 standard deviations of the rolling 1,000 |
| kill_loss_spike | LLM Foundry's callback: 2 x the mean of the last 100 (or 5 % of the run), more than 4 times |
| megatron | Megatron-LM's rerun machine: 10 x the largest of the first 100 |
| zclip | ZClip (2504.02507, algorithm 1): z > 2.5 of exponential means (0.97), 25 values of warm-up |
| cusum | two-sided CUSUM (Page 1954) of deviations from the mean of the last 100, slack .5, alarm at 5, then from 0 |

All but the last flag upward only: a falling loss is no fault. Each rule's own arithmetic treats NaN; that is part of the
comparison.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Rule = Callable[[NDArray[np.float64]], NDArray[np.bool_]]


def _window_rule(
    values_N: NDArray[np.float64], *, window: int, sigmas: float, least: int
) -> NDArray[np.bool_]:
    """x > mean + k std of the last ``window`` values without the current one. It skips values not below the bound."""
    flags_N = np.zeros(len(values_N), dtype=np.bool_)
    with np.errstate(invalid="ignore"):
        for i in range(least, len(values_N)):
            past_N = values_N[max(0, i - window) : i]
            # A comparison with NaN is false, so the step is skipped while NaN is in the window.
            flags_N[i] = not values_N[i] <= past_N.mean() + sigmas * past_N.std(ddof=1)
    return flags_N


def olmo_core(values_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    return _window_rule(values_N, window=128, sigmas=6.0, least=64)


def olmo2_score(values_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    return _window_rule(values_N, window=1000, sigmas=7.0, least=64)


def kill_loss_spike(values_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    window: deque[float] = deque(maxlen=max(100, round(0.05 * len(values_N))))
    flags_N = np.zeros(len(values_N), dtype=np.bool_)
    outliers = 0
    for i, value in enumerate(values_N.tolist()):
        if len(window) == window.maxlen:
            outliers = outliers + 1 if value >= 2 * (math.fsum(window) / len(window)) else 0
            flags_N[i] = outliers > 4
        window.append(value)
    return flags_N


def megatron(values_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    flags_N = ~np.isfinite(values_N)  # it checks for NaN and infinity, too
    with np.errstate(invalid="ignore"):
        flags_N[100:] |= values_N[100:] >= 10 * values_N[:100].max(initial=-math.inf)
    return flags_N


def zclip(values_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    flags_N = np.zeros(len(values_N), dtype=np.bool_)
    if len(values_N) <= 25:
        return flags_N
    mean, variance = float(values_N[:25].mean()), float(values_N[:25].var())
    for i, value in enumerate(values_N[25:].tolist(), start=25):
        deviation = math.sqrt(variance) if variance >= 0 else math.nan
        z = (value - mean) / (deviation + 1e-6)
        flags_N[i] = z > 2.5
        # A flagged value enters clipped, at mean + 2.5^2 sigma / z.
        entered = mean + 2.5 * deviation * (2.5 / z) if z > 2.5 else value
        mean = 0.97 * mean + 0.03 * entered
        variance = 0.97 * variance + 0.03 * (entered - mean) ** 2
    return flags_N


def cusum(values_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    flags_N = np.zeros(len(values_N), dtype=np.bool_)
    window: deque[float] = deque(maxlen=100)
    high = low = 0.0
    for i, value in enumerate(values_N.tolist()):
        if len(window) >= 20:
            mean = math.fsum(window) / len(window)
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / len(window)) + 1e-12
            z = (value - mean) / deviation
            high, low = max(0.0, high + z - 0.5), max(0.0, low - z - 0.5)
            if high > 5 or low > 5:
                flags_N[i], high, low = True, 0.0, 0.0
        if math.isfinite(value):
            window.append(value)
    return flags_N


RULES: Mapping[str, Rule] = {
    "OLMo-core (128, 6 sigma)": olmo_core,
    "OLMo 2 score (1000, 7 sigma)": olmo2_score,
    "KillLossSpike": kill_loss_spike,
    "Megatron": megatron,
    "ZClip (z 2.5)": zclip,
    "CUSUM (.5, 5)": cusum,
}

"""The frontier of plans: at every number of bytes, the least loss to expect by the measured layers.

The same knapsack (knapsack.py) chooses each point, a plan of its own, from the same sensitivities as the plan itself. Its loss is
the sum of its layers' harms, not verified: it holds as far as harms add up (divergence.py); for encoders squares of output errors
do.
"""

from __future__ import annotations

import math

import numpy as np

from stabilitylab.quantization.knapsack import choose
from stabilitylab.quantization.plan import QuantizationPlan

POINTS, FRONT = 24, 512


def frontier(plan: QuantizationPlan) -> list[tuple[float, float]]:
    """Share of the layers' 16-bit bytes, and expected loss increase in nats or relative output error; bytes rise, loss falls.

    Args:
        plan: with its sensitivities; without any the frontier is empty.
    """
    costs: list[list[float]] = []
    harms: list[list[float]] = []
    for layer in plan.sensitivity.values():
        kept = 2.0 * math.prod(layer["shape"])
        effects = list(layer["effects"].values())
        costs.append([kept, *(float(effect["bytes"]) for effect in effects)])
        harms.append([0.0, *(max(float(effect["harm"]), 0.0) for effect in effects)])
    if not costs:
        return []
    whole = sum(row[0] for row in costs)
    least = sum(min(row) for row in costs)
    found: list[tuple[float, float]] = []
    for budget in np.linspace(least, whole, POINTS):
        choice = choose(costs, harms, float(budget), front=FRONT)
        if choice is None:
            continue
        spent = sum(row[at] for row, at in zip(costs, choice, strict=True)) / whole
        harm = sum(row[at] for row, at in zip(harms, choice, strict=True))
        point = spent, harm if plan.criterion == "loss" else math.sqrt(harm)
        if not found or (point[0] > found[-1][0] and point[1] < found[-1][1]):
            found.append(point)
    return found

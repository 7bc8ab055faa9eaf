"""One option for each layer, the least sum of harms within a budget of costs: the multiple-choice knapsack problem.

    minimise  sum_l harm[l][choice l]    subject to    sum_l cost[l][choice l] <= budget

Dynamic programming over the non-dominated partial choices solves it (Nemhauser and Ullmann, 1969; Kellerer, Pferschy and Pisinger,
Knapsack Problems, 2004, section 11.5): after each layer it keeps only those to which no other is both cheaper and less harmful. It
is exact while no more than ``FRONT`` of them remain, which is so where layers share few shapes (sums of bytes coincide); beyond, it
keeps the least harmful in each 1/FRONT of the range of costs. It never rounds costs, so a result always fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FRONT = 8192


def choose(
    costs: Sequence[Sequence[float]], harms: Sequence[Sequence[float]], budget: float, *, front: int = FRONT
) -> list[int] | None:
    """The index of each layer's option; None where even the cheapest choice exceeds the budget.

    Args:
        costs: of each layer's options, at least one a layer, finite and not negative.
        harms: likewise.
        budget: for the sum of costs.
        front: how many partial choices to keep.
    """
    # The least that the layers still to come cost, after each layer.
    least = np.cumsum([0.0, *(min(row) for row in reversed(costs))])[::-1]
    # Sums in another order differ in the last bits.
    budget = budget * (1 + 1e-12)
    cost, harm = np.zeros(1), np.zeros(1)
    origins: list[tuple[np.ndarray, int]] = []
    for place, (row_cost, row_harm) in enumerate(zip(costs, harms, strict=True)):
        options = len(row_cost)
        cost = (cost[:, None] + np.asarray(row_cost, dtype=float)).ravel()
        harm = (harm[:, None] + np.asarray(row_harm, dtype=float)).ravel()
        kept = np.flatnonzero(cost <= budget - least[place + 1])
        kept = kept[np.lexsort((harm[kept], cost[kept]))]
        lowest = np.minimum.accumulate(harm[kept])
        kept = kept[np.concatenate([[True], lowest[1:] < lowest[:-1]])[: len(kept)]]
        if not len(kept):
            return None
        kept = _thinned(kept, cost[kept], front)
        cost, harm = cost[kept], harm[kept]
        origins.append((kept, options))
    at, choice = len(harm) - 1, []
    for kept, options in reversed(origins):
        at, option = divmod(int(kept[at]), options)
        choice.append(option)
    return choice[::-1]


def _thinned(kept: np.ndarray, cost: np.ndarray, front: int) -> np.ndarray:
    """The last, least harmful point of each of ``front`` equal ranges of cost, and the cheapest point."""
    if len(kept) <= front:
        return kept
    span = cost[-1] - cost[0]
    bins = ((cost - cost[0]) / span * (front - 1)).astype(int)
    last = np.append(bins[1:] != bins[:-1], True)
    last[0] = True
    thinned: np.ndarray = kept[last]
    return thinned

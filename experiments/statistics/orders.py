"""The order of all values of two groups as an e-process: exact for any distribution, and valid after every run.

If the hazard of the arm's values is theta times that of the baseline's (Lehmann 1953), the order of N values x_(1) < ... < x_(N)
has the probability (Savage 1956; Cox 1972)

    P_theta = prod_j w_j / sum_{i >= j} w_i        w = theta for the arm's values, 1 for the baseline's

and 1 / C(N, na) where all are alike. The ratio is a martingale as runs come in, in any order of arms, under every distribution
common to both arms (the safe logrank test: Grünwald, Ly, Pérez-Ortiz and ter Schure, arXiv:2011.06931). The e-process mixes it over
theta and over both ends of the scale, since proportional hazards weigh the small values. Tied values count with the mean over their
orders, the expectation over a random breaking of ties, and thus still a martingale. Infinite values are ties at the end.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

# Hazard ratios of the mixture, with equal weights: 2 for an effect of half a standard deviation, 30 for groups apart.
HAZARD_RATIOS = np.array([2.0, 6.0, 30.0])


def log_e_values(arm: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """Natural logarithms of the e-values for "the arm's values are larger" and "smaller"."""
    if not len(arm) or not len(baseline):
        return 0.0, 0.0
    values = np.concatenate([arm, baseline])
    is_arm = np.concatenate([np.ones(len(arm), bool), np.zeros(len(baseline), bool)])
    rates = np.concatenate([HAZARD_RATIOS, 1 / HAZARD_RATIOS])
    up, down = log_ratios(values, is_arm, rates), log_ratios(-values, is_arm, rates)
    half, each = len(HAZARD_RATIOS), math.log(2 * len(HAZARD_RATIOS))
    # A larger hazard means smaller values; on the reversed scale, larger ones.
    smaller = np.concatenate([up[:half], down[half:]])
    larger = np.concatenate([up[half:], down[:half]])
    return float(np.logaddexp.reduce(larger)) - each, float(np.logaddexp.reduce(smaller)) - each


def log_ratios(values: np.ndarray, is_arm: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """ln(P_theta / P_1) of the order of ``values`` for each theta in ``rates``."""
    order = np.argsort(values, kind="stable")
    labels, ordered = is_arm[order], values[order]
    total, arms = len(labels), int(labels.sum())
    # Choices of the arm's places are equally likely under theta = 1.
    log_choices = special.gammaln(total + 1) - special.gammaln(arms + 1) - special.gammaln(total - arms + 1)
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    arms_left = arms - np.concatenate(([0], np.cumsum(labels)[:-1]))
    others_left = (total - arms) - np.concatenate(([0], np.cumsum(~labels)[:-1]))
    risk = arms_left * rates[:, None] + others_left  # [theta, place]
    weight = np.where(labels, rates[:, None], 1.0)
    # P of the labels' order is prod w / risk; all values of a group are equally likely.
    fellows = np.where(labels, arms_left, others_left)
    logs = np.log(weight * fellows / risk)
    sums = np.add.reduceat(logs, starts, axis=1)  # [theta, block of ties]
    sizes = np.diff(np.concatenate((starts, [total])))
    for block in np.flatnonzero(sizes > 1):
        first, size = int(starts[block]), int(sizes[block])
        tied_arms = int(labels[first : first + size].sum())
        if 0 < tied_arms < size:
            sums[:, block] = _tied(
                int(arms_left[first]), int(others_left[first]), tied_arms, size - tied_arms, rates
            )
    result: np.ndarray = sums.sum(axis=1) + log_choices
    return result


def _tied(arms: int, others: int, tied_arms: int, tied_others: int, rates: np.ndarray) -> np.ndarray:
    """ln of the mean of P(order) over all orders of a block of ties, with ``arms`` and ``others`` still at risk."""
    # ways[i] when k of the block have come, i of them the arm's: the k-th was the arm's, of arms - i + 1 that were left beside
    # others - j, or the baseline's, of others - j + 1 beside arms - i.
    size = tied_arms + tied_others
    i, k = np.arange(tied_arms + 1)[None, :, None], np.arange(1, size + 1)[:, None, None]
    j = k - i
    inside = (j >= 0) & (j <= tied_others)
    with np.errstate(divide="ignore", invalid="ignore"):
        own = (arms - i + 1) * rates
        own = np.where(inside & (i > 0), own / (own + others - j), 0.0)
        its = others - j + 1.0
        its = np.where(inside & (j > 0), its / ((arms - i) * rates + its), 0.0)
    ways = np.zeros((tied_arms + 1, len(rates)))
    ways[0] = 1.0
    for came, stayed in zip(own, its, strict=True):
        stayed *= ways
        stayed[1:] += ways[:-1] * came[1:]
        ways = stayed
    orders: np.ndarray = np.log(ways[-1]) - (
        special.gammaln(tied_arms + tied_others + 1)
        - special.gammaln(tied_arms + 1)
        - special.gammaln(tied_others + 1)
    )
    return orders

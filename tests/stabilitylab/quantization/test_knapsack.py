"""The planner's knapsack against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from stabilitylab.quantization.knapsack import choose


def brute(costs, harms, budget):
    best = None
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        cost = sum(row[i] for row, i in zip(costs, choice, strict=True))
        harm = sum(row[i] for row, i in zip(harms, choice, strict=True))
        if cost <= budget and (best is None or harm < best):
            best = harm
    return best


@pytest.mark.parametrize("seed", range(25))
def test_it_finds_what_trying_everything_finds(seed):
    dice = random.Random(seed)
    layers, options = dice.randint(1, 5), dice.randint(1, 4)
    # Whole numbers: sums are exact, and equal costs and harms occur.
    costs = [[float(dice.randint(0, 9)) for _ in range(options)] for _ in range(layers)]
    harms = [[float(dice.randint(0, 9)) for _ in range(options)] for _ in range(layers)]
    for budget in (0.0, 3.0, 3.0 * layers, 9.0 * layers):
        expected, found = brute(costs, harms, budget), choose(costs, harms, budget)
        if expected is None:
            assert found is None
            continue
        assert found is not None
        assert sum(row[i] for row, i in zip(costs, found, strict=True)) <= budget
        assert sum(row[i] for row, i in zip(harms, found, strict=True)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_a_thinned_front_fits_and_is_close(seed):
    dice = random.Random(seed)
    costs = [[dice.random() for _ in range(4)] for _ in range(7)]
    harms = [[dice.random() for _ in range(4)] for _ in range(7)]
    exact, thin = choose(costs, harms, 3.0), choose(costs, harms, 3.0, front=64)
    assert exact is not None
    assert thin is not None
    cost, best, close = (
        sum(row[i] for row, i in zip(rows, found, strict=True))
        for rows, found in ((costs, thin), (harms, exact), (harms, thin))
    )
    assert cost <= 3.0 * (1 + 1e-12)
    assert best == pytest.approx(brute(costs, harms, 3.0), rel=1e-12)
    # Each of seven layers may put a partial choice in the place of one that costs less by a range of costs, 1/63 of the budget at
    # most, and harms no less: what is best with seven such ranges less is never lost.
    assert best <= close <= brute(costs, harms, 3.0 * (1 - 7 / 63))


def test_nothing_fits():
    assert choose([[2.0], [3.0]], [[0.0], [0.0]], 4.9) is None
    assert choose([[2.0], [3.0]], [[0.0], [0.0]], 5.0) == [0, 0]

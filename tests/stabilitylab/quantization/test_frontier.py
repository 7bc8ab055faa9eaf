"""The frontier against every plan that there is."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from stabilitylab.quantization.frontier import frontier


def plan_of(criterion="loss", layers=5, seed=0):
    rng = np.random.default_rng(seed)
    sensitivity = {
        f"layers.{i}": {
            "shape": [16, 32],
            "effects": {
                name: {"bytes": size, "harm": float(harm)}
                for name, size, harm in zip(
                    ("int8", "int4"), (528, 272), np.sort(rng.exponential(0.01, 2)), strict=True
                )
            },
        }
        for i in range(layers)
    }
    return SimpleNamespace(sensitivity=sensitivity, criterion=criterion)


@pytest.mark.parametrize("criterion", ["loss", "output error"])
def test_no_plan_lies_below_it(criterion):
    plan = plan_of(criterion)
    line = frontier(plan)
    shares, losses = zip(*line, strict=True)
    assert list(shares) == sorted(shares)
    assert list(losses) == sorted(losses, reverse=True)
    assert line[-1] == (1.0, 0.0)
    options = [
        [(1024, 0.0), *((e["bytes"], e["harm"]) for e in of["effects"].values())]
        for of in plan.sensitivity.values()
    ]
    for choice in itertools.product(*options):
        share = sum(size for size, _ in choice) / (5 * 1024)
        harm = sum(harm for _, harm in choice)
        loss = harm if criterion == "loss" else harm**0.5
        # A point of no more bytes than the next plan's budget is beaten, or met, by one of the line within a budget's step.
        near = [least for at, least in line if at <= share + 1 / 23]
        assert not near or min(near) <= loss + 1e-12


def test_without_sensitivities_there_is_none():
    assert frontier(SimpleNamespace(sensitivity={}, criterion="loss")) == []

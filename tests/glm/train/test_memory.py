"""Formulas of training memory against the tensors of an engine at work."""

from __future__ import annotations

import pytest

from experiments.benchmarks.memory import PRECISIONS, STATES, Settings, measure, states_compared


@pytest.fixture(scope="module")
def found():
    return {precision: measure(Settings(rows=2), precision) for precision in PRECISIONS}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_formulas_are_what_tensors_take(found, precision):
    formula, measured = found[precision]["formula"], found[precision]["measured"]
    for name in (*STATES, "gradients, backward", "gradients, update", "activations"):
        assert measured[name] == formula[name], name
    # Beside its matrices the loss has some vectors of one number a position.
    assert 0 <= measured["loss"] - formula["loss"] < 0.01 * formula["loss"]


def test_what_bf16_costs(found):
    """16 bytes a parameter in fp16, 18 in bf16: an fp32 gradient in place of a half one."""
    more = states_compared(found)
    assert more["between micro-batches"] == pytest.approx(2 / 16)
    assert more["at the end of a backward pass"] == pytest.approx(4 / 16)
    assert more["in the update"] == pytest.approx(-2 / 20)

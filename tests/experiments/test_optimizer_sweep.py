"""The sweep over optimizers passes a plain one, names one that cannot be made, and finds each fault."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from experiments.benchmarks.optimizer_sweep import made, main, optimizers_of, trial
from stabilitylab.errors import InputError
from stabilitylab.monitoring.empty_steps import EmptySteps


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STABILITYLAB_STRICT", "1")


def test_torchs_optimizers_are_found_and_one_passes() -> None:
    kinds = {kind.__name__ for kind in optimizers_of(torch.optim)}
    assert {"AdamW", "SGD", "Muon"} <= kinds
    assert "Optimizer" not in kinds
    for kind, rms_t in ((torch.optim.AdamW, "yes"), (torch.optim.Muon, "no")):
        line, passed = trial(partial(made, kind))
        assert (passed, line) == (True, f"same yes, updates 12/12, rms_t {rms_t}, alarms none")


def test_what_cannot_be_tried_is_named() -> None:
    line, passed = trial(partial(made, torch.optim.LBFGS))
    assert passed is None
    assert line.startswith("not tried, TypeError: LBFGS.step() missing")


def test_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: EmptySteps, optimizer: Any) -> None:
        raise RuntimeError("broken")

    def moves(self: EmptySteps, optimizer: Any) -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].mul_(1.001)

    for act, told in ((breaks, "FAULT, RuntimeError: broken"), (moves, "FAULT, same NO")):
        monkeypatch.setattr(EmptySteps, "begins", act)
        line, passed = trial(partial(made, torch.optim.SGD))
        assert passed is False
        assert line.startswith(told)


def test_a_package_that_is_not_there() -> None:
    with pytest.raises(InputError, match="no_such_package cannot be imported"):
        main(["no_such_package"])
    assert main([]) == 2

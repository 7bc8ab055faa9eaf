"""Settings of an optimizer's groups are told from the state that it keeps there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stabilitylab.attribution.undo_changes import settings_of
from stabilitylab.probes.optimizer_settings import USUAL, setting_names
from tests.stabilitylab.probes.test_outside_changes import DistanceFree


def test_what_the_constructor_takes_is_a_setting() -> None:
    names = setting_names(DistanceFree([nn.Parameter(torch.zeros(1))]))
    assert {"lr", "growth", "weight_decay", "momentum"} <= names
    assert not {"params", "k", "weight_sum", "d"} & names


def test_every_setting_of_torchs_optimizers_is_one() -> None:
    for kind in (
        torch.optim.AdamW,
        torch.optim.SGD,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.Adadelta,
    ):
        optimizer: Any = kind([nn.Parameter(torch.zeros(1))])
        assert set(optimizer.defaults) <= setting_names(optimizer) | {"decoupled_weight_decay"}


def test_a_constructor_that_cannot_be_read() -> None:
    class Opaque:
        __signature__ = "none"

    assert setting_names(Opaque()) == USUAL


def test_forks_put_settings_back_and_no_state() -> None:
    optimizer = DistanceFree([nn.Parameter(torch.zeros(1))], lr=0.1, weight_decay=0.01)
    (found,) = settings_of(optimizer)
    assert {name: found[name] for name in ("lr", "weight_decay", "growth")} == {
        "lr": 0.1,
        "weight_decay": 0.01,
        "growth": 2.0,
    }
    assert not {"k", "weight_sum", "d", "params"} & found.keys()

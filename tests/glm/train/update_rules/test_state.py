"""Runs continue from saved states to the bit; combinations that cannot work are refused in a line."""

from __future__ import annotations

import pytest
import torch

from glm.distributed.config import ParallelConfig
from glm.errors import InputError
from glm.model.config import AttentionConfig, ModelConfig
from glm.precision import PrecisionPolicy
from glm.train.config import TrainConfig
from glm.train.optimizer import MixedPrecisionAdamW
from glm.train.update_rules import RULES, OptimizerConfig
from glm.train.update_rules.config import GuardConfig, MuonConfig, RateFactors
from tests.glm.train.update_rules.formulas import (
    RATE,
    SLOW,
    Net,
    history,
)


@pytest.mark.parametrize(
    "config",
    [
        *(OptimizerConfig(kind=kind, slow=SLOW) for kind in RULES),
        OptimizerConfig(kind="lion", cautious=True, guard=GuardConfig(update_norm=2.0, skip_step=6.0)),
        OptimizerConfig(guard=GuardConfig(adagc=True)),
        OptimizerConfig(guard=GuardConfig(spam="stable", reset=7)),
        OptimizerConfig(guard=GuardConfig(spam="spam", reset=7)),
        OptimizerConfig(decay="adamc", zclip=True),
    ],
    ids=lambda c: f"{c.kind}-{c.guard.spam}-{c.decay}",
)
@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_a_saved_state_goes_on_to_the_bit(config, policy):
    def on(model, optimizer, steps):
        for gradients in steps:
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name].clone().to(parameter.dtype)
            optimizer.accumulate()
            optimizer.gradients(1.0)
            optimizer.step_with(RATE, clip=1.0)
            optimizer.zero_grad()

    steps = history(40)
    one = Net()
    first = MixedPrecisionAdamW(one, config, PrecisionPolicy(precision=policy))
    on(one, first, steps[:20])
    weights, kept = (
        {n: t.detach().clone() for n, t in d.items()} for d in (first.masters(), first.moments())
    )
    counters = first.counters()
    on(one, first, steps[20:])
    two = Net()
    second = MixedPrecisionAdamW(two, config, PrecisionPolicy(precision=policy))
    second.load(masters=weights, moments=kept)
    second.load_counters(counters)
    on(two, second, steps[20:])
    for name, tensor in {**first.masters(), **first.moments()}.items():
        assert torch.equal(tensor, {**second.masters(), **second.moments()}[name]), name


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("StableAdamW", lambda: OptimizerConfig(kind="lion", update_clipping=True)),
        ("second moments", lambda: OptimizerConfig(kind="muon", guard=GuardConfig(spam="spam"))),
        ("choose one", lambda: GuardConfig(adagc=True, spam="spam")),
        ("must be positive", lambda: RateFactors(hidden=0.0)),
        ("lie in", lambda: MuonConfig(momentum=1.0)),
        (
            "whole matrices",
            lambda: TrainConfig(optimizer=OptimizerConfig(kind="muon"), parallel=ParallelConfig(data=2)),
        ),
        (
            "whole matrices",
            lambda: TrainConfig(
                optimizer=OptimizerConfig(kind="soap"), parallel=ParallelConfig(data=2, zero=0)
            ),
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(message, make):
    with pytest.raises(InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def test_muon_over_copies_is_allowed():
    TrainConfig(
        optimizer=OptimizerConfig(kind="muon"),
        parallel=ParallelConfig(data=2, zero=0),
        model=ModelConfig(attention=AttentionConfig(qk_norm=True)),
    )

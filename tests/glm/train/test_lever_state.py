"""A lever's memory is part of the state: an engine that loads it continues to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from glm.data.batch import Batch
from glm.model.config import AttentionConfig, ModelConfig
from glm.train.config import BatchConfig, TrainConfig
from glm.train.engine import LocalEngine
from glm.train.update_rules import OptimizerConfig
from glm.train.update_rules.config import GuardConfig, MuonConfig

SMALL = ModelConfig(vocabulary=31, layers=2, hidden=16, heads=2, length=16, norm="pre")
LEVERS = {
    "spectral": dataclasses.replace(SMALL, spectral=True),
    "qk clip": dataclasses.replace(SMALL, attention=AttentionConfig(qk_clip=0.05)),
}
RULES = OptimizerConfig(
    kind="muon", muon=MuonConfig(per_head=True), guard=GuardConfig(adagc=True, skip_step=6.0, update_norm=2.0)
)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens, targets = torch.randint(0, 31, (2, 2, 16), generator=generator)
    place = torch.arange(16).expand(2, 16).contiguous()
    return Batch(
        tokens_BT=tokens,
        targets_BT=targets,
        positions=place,
        segments_BT=torch.zeros(2, 16, dtype=torch.int64),
        context_BT=place < 4,
        provenance=(),
    )


def train(engine, steps):
    for step in steps:
        engine.forward_backward(batch(step), step)
        engine.gradients()
        engine.update(0.05, clip=1.0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", LEVERS)
def test_a_state_goes_on_to_the_bit(name, precision):
    config = TrainConfig(
        model=LEVERS[name], batch=BatchConfig(rows=2), optimizer=RULES, precision=precision, seed=3
    )
    one = LocalEngine(config)
    train(one, range(20))
    weights, moments = ({n: t.detach().clone() for n, t in d.items()} for d in one.tensors())
    state = one.state_dict()
    train(one, range(20, 26))
    two = LocalEngine(config)
    two.load_tensors(weights, moments)
    two.load_state_dict(state)
    train(two, range(20, 26))
    for ours, theirs in zip(one.tensors(), two.tensors(), strict=True):
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), key
    if name == "qk clip":
        assert two.levers()["qk_clip/-/clipped_heads"] > 0
    assert two.levers()["guard/-/left_out"] == 0.0

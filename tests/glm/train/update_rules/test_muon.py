"""Muon against torch's, and each matrix of a weight by itself."""

from __future__ import annotations

import pytest
import torch

from glm.model.config import ModelConfig
from glm.model.transformer import Transformer
from glm.precision import PrecisionPolicy
from glm.train.optimizer import MixedPrecisionAdamW
from glm.train.update_rules import OptimizerConfig
from glm.train.update_rules.config import MuonConfig
from glm.train.update_rules.muon import matrix_rows, orthogonalized
from tests.glm.train.update_rules.formulas import (
    RATE,
    Net,
    history,
    newton_schulz,
    trained,
)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_is_torchs(scale):
    """Theirs iterates in bf16: ten steps of rate .01 differ by its rounding, u = 2^-8 of updates of size ``scale``."""
    config = MuonConfig(scale="rms" if scale == "match_rms_adamw" else "spectral")
    ours, _, _ = trained(OptimizerConfig(kind="muon", muon=config, clip=0.0), steps=10)
    model = Net()
    matrices = {"one.weight": model.one.weight, "two.weight": model.two.weight}
    theirs = torch.optim.Muon(
        list(matrices.values()), lr=RATE, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn=scale
    )
    for gradients in history(10):
        for name, parameter in matrices.items():
            parameter.grad = gradients[name].clone()
        theirs.step()
    for name, parameter in matrices.items():
        torch.testing.assert_close(ours[name], parameter.detach().double(), rtol=0, atol=10 * RATE * 0.02)


def test_muon_orthogonalizes_each_matrix_of_a_weight():
    generator = torch.Generator().manual_seed(2)
    matrices = [
        torch.randn(shape, generator=generator) for shape in ((8, 8), (16, 8), (8, 16), (3, 8, 16), (5, 9))
    ]
    for given, image in zip(matrices, orthogonalized(matrices), strict=True):
        assert image.shape == given.shape
        for one, expected in zip(
            image.reshape(-1, *image.shape[-2:]), given.reshape(-1, *given.shape[-2:]), strict=True
        ):
            torch.testing.assert_close(one.double(), newton_schulz(expected.double()), rtol=0, atol=1e-4)
    model = Transformer(ModelConfig(vocabulary=11, layers=1, hidden=8, heads=2, length=8))
    path = "layers.0.attention.query_key_value.weight"
    assert matrix_rows(model, per_head=False)[path] == (8, 8, 8)
    assert matrix_rows(model, per_head=True)[path] == (4,) * 6
    up = "layers.0.feed_forward.up.weight"
    assert sum(matrix_rows(model, per_head=False)[up]) == model.state_dict()[up].shape[0]
    # A head's update has the singular values of a head's matrix, whatever the others' gradients are.
    for per_head in (False, True):
        config = OptimizerConfig(kind="muon", muon=MuonConfig(per_head=per_head), weight_decay=0.0)
        optimizer = MixedPrecisionAdamW(model, config, PrecisionPolicy())
        before = model.state_dict()[path].clone()
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if name == path:
                parameter.grad[:4] *= 1e-3
        optimizer.gradients(1.0)
        optimizer.step_with(RATE, clip=0.0)
        optimizer.zero_grad()
        moved = (model.state_dict()[path] - before)[:4] / RATE
        assert (torch.linalg.svdvals(moved).min() > 0.2) == per_head


def test_how_many_are_iterated_together_is_the_caches_business(monkeypatch):
    shapes = [(16, 24), (24, 16), (3, 16, 24), (16, 24), (8, 8)]
    matrices = [
        torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)
    ]
    found = []
    for cached in (1, 1000, 2**30):
        monkeypatch.setattr("glm.train.update_rules.muon.CACHED", cached)
        found.append(orthogonalized(matrices))
    for few, some, whole in zip(*found, strict=True):
        torch.testing.assert_close(few, whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(some, whole, rtol=0, atol=1e-6)

"""A backward pass that computes tensors again, instead of keeping them, gives the same gradients to the bit, in less memory."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from glm.model.config import AttentionConfig, FeedForwardConfig, ModelConfig
from glm.model.layers import Linear, Norm
from glm.model.norms import RMSNorm
from glm.model.transformer import Transformer
from glm.precision import kernel as compiled
from glm.precision import rms, with_recipe
from glm.precision.recomputed import recipe_of

GLM = ModelConfig(
    vocabulary=64,
    layers=2,
    hidden=32,
    heads=4,
    length=24,
    feed_forward=FeedForwardConfig(kind="geglu", inner=48),
)
MODELS = {
    "glm": GLM,
    "pre": replace(GLM, norm="pre"),
    "post": replace(GLM, norm="post"),
    "sandwich": replace(GLM, norm="sandwich"),
    "pre-scaled": replace(GLM, norm="pre-scaled"),
    "rms": replace(GLM, norm="pre", norm_kind="rms", bias=False),
    "one gain": replace(GLM, norm="pre", norm_kind="rms-single"),
    "qk-norm": replace(GLM, attention=AttentionConfig(qk_norm=True)),
    "recomputed": replace(GLM, recompute=True),
}  # fmt: skip


def gradients(config: ModelConfig) -> list[Tensor]:
    model = Transformer(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(64, (3, 24), generator=generator)
    segments, context = torch.zeros(3, 24, dtype=torch.long), torch.arange(24).expand(3, 24) < 7
    loss, _ = model.loss(tokens, tokens.roll(1, 1), torch.arange(24).expand(3, 24), segments, context)
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_gradients_are_those_of_kept_inputs(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    again = gradients(config)
    asked = []
    module = import_module("glm.precision.matmul")  # the package has a function of this name
    monkeypatch.setattr(module, "recipe_of", lambda x: asked.append(recipe_of(x)))
    kept = gradients(config)
    assert any(recipe is not None for recipe in asked)
    assert len(again) == len(kept)
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


def saved(compute) -> list[tuple[int, ...]]:
    """Shapes of the tensors that autograd keeps, each storage once."""
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive = compute()
    assert alive is not None
    return [tuple(x.shape) for x in found.values()]


@pytest.mark.parametrize("norm", [Norm(16, epsilon=1e-5, bias=True), RMSNorm(16, epsilon=1e-5, kind="rms")])
def test_a_norms_result_is_not_kept(norm: torch.nn.Module) -> None:
    if isinstance(norm, RMSNorm) and rms.kernel() is None:
        pytest.skip("no C compiler")
    x, layer = torch.randn(5, 16, requires_grad=True), Linear(16, 8)
    assert saved(lambda: layer(norm(x))).count((5, 16)) == 1  # x
    assert saved(lambda: layer(norm(x) * 2)).count((5, 16)) == 2  # another tensor


@pytest.mark.skipif(compiled.kernel() is None, reason="no C compiler")
def test_of_gated_gelu_what_was_raised_alone_is_kept() -> None:
    x, layer = torch.randn(5, 32, requires_grad=True), Linear(16, 8)
    shapes = saved(lambda: layer(compiled.gated_gelu(x)))
    assert shapes.count((5, 32)) == 1
    assert (5, 16) not in shapes


@pytest.mark.skipif(compiled.kernel() is None, reason="no C compiler")
@pytest.mark.parametrize("frozen", [False, True])
def test_gated_gelu_twice_backward_and_before_a_frozen_matrix(frozen: bool) -> None:
    """In whatever order its distribution function is asked for."""
    x, layer = torch.randn(5, 32, requires_grad=True), Linear(16, 8)
    layer.requires_grad_(not frozen)
    y = layer(compiled.gated_gelu(x))
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    second = torch.autograd.grad(y.sum(), x)[0]
    a, b = x.detach().double().chunk(2, -1)
    above = layer.weight.detach().double().sum(0).expand(5, 16)
    slope = torch.special.ndtr(b) + b * torch.exp(-b.square() / 2) / (2 * torch.pi) ** 0.5
    exact = torch.cat((above * F.gelu(b), above * a * slope), -1)
    torch.testing.assert_close(first.double(), exact, rtol=0, atol=64 * 2.0**-24 * float(exact.abs().max()))
    assert torch.equal(first, second)


def test_what_was_changed_in_place_is_kept() -> None:
    norm, layer = Norm(16, epsilon=1e-5, bias=True), Linear(16, 8)
    x = torch.randn(5, 16, requires_grad=True)
    y = norm(x)
    assert recipe_of(y) is not None
    y.mul_(3)
    assert recipe_of(y) is None
    layer(y).sum().backward()
    assert layer.weight.grad is not None
    expected = y.detach().sum(0).expand(8, 16)
    torch.testing.assert_close(
        layer.weight.grad, expected, rtol=0, atol=16 * 2.0**-24 * float(y.detach().abs().sum(0).max())
    )


def test_nothing_is_noted_without_a_gradient() -> None:
    x = torch.randn(5, 16, requires_grad=True)
    with torch.no_grad():
        assert recipe_of(with_recipe(x * 2, torch.mul, x)) is None
    assert recipe_of(Norm(16, epsilon=1e-5, bias=True).requires_grad_(False)(x.detach())) is None


def test_a_checkpoint_keeps_its_input_alone() -> None:
    norm, layer = Norm(16, epsilon=1e-5, bias=True), Linear(16, 8)
    x = torch.randn(5, 16, requires_grad=True)
    assert saved(lambda: checkpoint(lambda x: layer(norm(x * 2)), x, use_reentrant=False)).count((5, 16)) <= 1

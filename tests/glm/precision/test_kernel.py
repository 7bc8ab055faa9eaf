"""The compiled kernel against float64 and against the torch operations that it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from glm.model.config import AttentionConfig, ModelConfig
from glm.model.positions import rotate, rotation
from glm.model.transformer import Transformer
from glm.precision import attention_scores, half_units, softmax_matmul
from glm.precision import kernel as kernels
from glm.precision.kernel import attention, gated_gelu, losses, sums_weights, weight_gradient

pytestmark = pytest.mark.skipif(kernels.kernel() is None, reason="no C compiler")

EPSILON = 2.0**-24


def exact_attention(qkv, turned, bias, scale, divisor):
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    if turned is not None:
        q, k = rotate(q, turned), rotate(k, turned)
    return ((divisor * ((q * scale) @ k.mT) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("B", "T", "H", "D", "turns"),
    [(2, 128, 4, 16, "rope"), (1, 50, 3, 24, "rope2d"), (2, 7, 2, 6, "none"), (1, 97, 1, 40, "one")],
)
def test_attention_and_its_gradients_are_float64s(B, T, H, D, turns):
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3, H, D, dtype=torch.float64)
    where = torch.arange(T).expand(1 if turns == "one" else B, T)
    positions = torch.stack((where, where.flip(1)), -1) if turns == "rope2d" else where
    turned = None
    if turns != "none":
        turned = rotation(positions, D, 1e4, torch.float64, two=turns == "rope2d")
    # Heads with biases of their own, and a mask; the first row of the second batch row sees itself only.
    bias = torch.randn(B, H, T, T, dtype=torch.float64).masked_fill(
        torch.ones(T, T).triu(1).bool(), -math.inf
    )
    grad = torch.randn(B, T, H * D, dtype=torch.float64)
    results = []
    for dtype, call in ((torch.float64, exact_attention), (torch.float32, attention)):
        given = qkv.to(dtype).requires_grad_()
        angles = None if turned is None else tuple(part.to(dtype) for part in turned)
        y = call(given, angles, bias.to(dtype), 0.2, 3.0)
        (gradient,) = torch.autograd.grad(y, given, grad.to(dtype))
        results.append((y.detach().double(), gradient.double()))
    for exact, found in zip(*results, strict=True):
        # Sums of T or D rounded terms; scores of up to 20 carry 20 ulp of theirs into the weights.
        assert (found - exact).abs().max() < 64 * EPSILON * max(1, exact.abs().max()) * math.sqrt(T)


def masks(T):
    """Who sees whom, [T, T]: causal, with context, several pieces, at random, and one query that sees nobody."""
    seen = torch.ones(T, T).tril().bool()
    pieces = (torch.arange(T) * 3 // T)[:, None] == (torch.arange(T) * 3 // T)
    thin = torch.rand(T, T) < 0.2
    blind = seen.clone()
    blind[T // 2] = False
    return {
        "causal": seen,
        "context": seen | (torch.arange(T) < T // 3),
        "pieces": seen & pieces,
        "random": thin | torch.eye(T).bool(),
        "blind": blind,
    }


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, 1e30])
@pytest.mark.parametrize("mask", ["causal", "context", "pieces", "random", "blind"])
@pytest.mark.parametrize("T", [50, 130])
def test_keys_that_nobody_of_a_block_sees_are_left_out_only_where_that_changes_nothing(T, mask, bad):
    torch.manual_seed(0)
    qkv = torch.randn(2, T, 3, 2, 20, dtype=torch.float64)
    if bad is not None:
        qkv[0, T - 2, :, 1, 3] = bad
    bias = torch.zeros(1, 1, T, T, dtype=torch.float64).masked_fill(~masks(T)[mask], -math.inf)
    grad = torch.randn(2, T, 40, dtype=torch.float64)
    found = []
    # What 1e30 does is a matter of the format: beside the same operations in fp32.
    for dtype, call in (
        (torch.float64 if bad is None else torch.float32, exact_attention),
        (torch.float32, attention),
    ):
        given = qkv.to(dtype).requires_grad_()
        y = call(given, None, bias.to(dtype), 0.2, 3.0)
        (gradient,) = torch.autograd.grad(y, given, grad.to(dtype))
        found.append((y.detach().double(), gradient.double()))
    for exact, ours in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), exact.isnan())
        torch.testing.assert_close(
            ours,
            exact,
            rtol=1e-4,
            atol=1e-4 * exact.nan_to_num().abs().clamp(max=1e3).max().item(),
            equal_nan=True,
        )


def every_half(dtype):
    """All numbers of a half format."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_numbers_are_read_and_rounded_as_torch_does(dtype):
    """a gelu(b) where gelu(b) is b in fp32 already: the product is a b, rounded once."""
    a = every_half(dtype)
    for b in (8.0, 17.0, 1024.0):
        found = gated_gelu(torch.stack((a, torch.full_like(a, b)), 1)).flatten()
        assert torch.equal(found.nan_to_num(7.0), (a.float() * b).to(dtype).nan_to_num(7.0))
        assert torch.equal(found.isnan(), a.isnan())
    # Between two numbers, and in fp16 beneath its normal ones and beyond its largest.
    small = gated_gelu(torch.stack((a, torch.full_like(a, 0.5)), 1)).flatten().double()
    exact = a.double() * F.gelu(torch.tensor(0.5, dtype=torch.float64))
    finite = a.isfinite()
    near = torch.maximum(
        exact.abs() * {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype], torch.tensor(2.0**-25)
    )
    assert ((small - exact).abs() <= near * 1.001)[finite].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_attention_rounds_where_torch_operations_do(dtype, monkeypatch):
    """The kernel, and the same steps in torch, each rounded, are both as far from float64 as the format's rounding allows."""
    monkeypatch.setattr(half_units, "NATIVE_DTYPES", frozenset())
    B, T, H, D = 2, 50, 3, 24
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3, H, D).to(dtype)
    turned = rotation(torch.arange(T).expand(B, T), D, 1e4, dtype, two=False)
    bias = torch.zeros(1, 1, T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    grad = torch.randn(B, T, H * D).to(dtype)

    def by_steps(given, angles, bias, scale, divisor):
        q, k, v = (part.transpose(1, 2) for part in given.unbind(2))
        q, k = rotate(q, angles), rotate(k, angles)
        return softmax_matmul(attention_scores(q, k, bias, scale, divisor), v).transpose(1, 2).flatten(2)

    errors = {}
    wide = tuple(part.double() for part in turned)
    exact = qkv.double().requires_grad_()
    true = exact_attention(exact, wide, bias.double(), 0.1, 2.0)
    (true_gradient,) = torch.autograd.grad(true, exact, grad.double())
    for name, call in (("kernel", attention), ("steps", by_steps)):
        given = qkv.clone().requires_grad_()
        y = call(given, turned, bias, 0.1, 2.0)
        (gradient,) = torch.autograd.grad(y, given, grad)
        assert (y.dtype, gradient.dtype) == (dtype, dtype)
        errors[name] = [
            (found.double() - of).square().mean().sqrt()
            for found, of in ((y, true), (gradient, true_gradient))
        ]
    for ours, theirs in zip(errors["kernel"], errors["steps"], strict=True):
        assert ours < 1.1 * theirs


def test_scores_overflow_in_fp16_where_torch_operations_do():
    qkv = torch.full((1, 16, 3, 1, 16), 100.0, dtype=torch.float16)  # scores of 160,000
    bias = torch.zeros(1, 1, 16, 16)
    assert attention(qkv, None, bias, 1.0, 1.0).isnan().all()
    assert attention(qkv, None, bias, 0.25, 4.0).isfinite().all()  # 40,000 is what is rounded
    assert attention(qkv.bfloat16(), None, bias, 1.0, 1.0).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_largest_score_of_each_head_is_kept_for_who_asks(dtype):
    torch.manual_seed(0)
    qkv = torch.randn(2, 50, 3, 3, 24).to(dtype)
    bias = torch.zeros(1, 1, 50, 50).masked_fill(torch.ones(50, 50).triu(1).bool(), -math.inf)
    largest = torch.empty(2, 3)
    y = attention(qkv, None, bias, 0.25, 2.0, largest)
    assert torch.equal(y, attention(qkv, None, bias, 0.25, 2.0))
    q, k, _ = (part.transpose(1, 2) for part in qkv.double().unbind(2))
    exact = (2 * ((q * 0.25) @ k.mT) + bias).amax((2, 3))
    rounding = {torch.float32: 2.0**-18, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    torch.testing.assert_close(largest.double(), exact, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_goes_through_as_in_torch(bad):
    qkv = torch.randn(1, 20, 3, 2, 16)
    qkv[0, 5, 0, 1, 3] = bad
    bias = torch.zeros(1, 1, 20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), -math.inf)
    found, exact = attention(qkv, None, bias, 0.25, 1.0), exact_attention(qkv, None, bias, 0.25, 1.0)
    assert torch.equal(found.isfinite(), exact.isfinite())
    raised = torch.tensor([[1.0, 1.0, 1.0, bad, -math.inf, 1e30]])
    assert not gated_gelu(raised)[0, :2].isfinite().any() or bad == math.inf
    assert gated_gelu(raised)[0, 2] == 1e30


def test_gated_gelu_and_its_gradient_are_float64s():
    raised = torch.cat((torch.randn(9, 2000), torch.linspace(-12, 12, 18_000).view(9, 2000)), 1)
    wide, given = raised.double().requires_grad_(), raised.clone().requires_grad_()
    a, b = wide.chunk(2, -1)
    exact, found = a * F.gelu(b), gated_gelu(given)
    grad = torch.randn(9, 2000)
    exact.backward(grad.double())
    found.backward(grad)
    # F's error is a unit of 1, as erf's in fp32 is; it is multiplied by a and b.
    bound = 3 * EPSILON * (1 + a.abs() * b.abs())
    assert ((found - exact).abs() < bound).all()
    scale = grad.abs().double().repeat(1, 2) * (1 + wide.detach().abs().view(9, 2, 2000).prod(1).repeat(1, 2))
    assert ((given.grad - wide.grad).abs() < 16 * EPSILON * (1 + scale)).all()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_losses_and_the_logits_gradient_are_float64s(z_loss):
    torch.manual_seed(1)
    logits = torch.randn(30, 500) * 8
    target = torch.randint(500, (30,))
    wide = logits.double().requires_grad_()
    z = wide.logsumexp(1)
    exact = z - wide.gather(1, target[:, None])[:, 0] + z_loss * z.square()
    exact.sum().backward()
    found = losses(logits, target, z_loss)
    assert (found - exact).abs().max() < 8 * EPSILON * exact.max()
    assert (logits - wide.grad).abs().max() < 8 * EPSILON


@pytest.mark.parametrize(("N", "outputs", "inputs"), [(1024, 192, 64), (7, 5, 17), (100, 49, 160)])
def test_weight_gradients_are_float64s(N, outputs, inputs):
    g, x = torch.randn(N, outputs), torch.randn(N, inputs)
    found = weight_gradient(g, x, bias=True)
    assert found[1] is not None
    sums = g.double().abs().t() @ x.double().abs()
    assert ((found[0] - g.double().t() @ x.double()).abs() <= EPSILON * math.sqrt(N) * sums).all()
    assert ((found[1] - g.double().sum(0)).abs() <= EPSILON * N * g.double().abs().sum(0)).all()
    assert not sums_weights(g, x[:, :9])  # narrower than the kernel takes


def tiny(**attention):
    config = ModelConfig(
        vocabulary=64, layers=2, hidden=32, heads=2, length=48, attention=AttentionConfig(**attention)
    )
    return Transformer(config, 3)


def gradients_of(model, hook=None):
    torch.manual_seed(0)
    tokens, positions = torch.randint(64, (2, 48)), torch.arange(48).expand(2, 48)
    context = torch.arange(48).expand(2, 48) < 10
    handle = model.layers[1].attention.scores.register_forward_hook(hook) if hook else None
    loss, _ = model.loss(tokens, tokens, positions, torch.zeros_like(tokens), context)
    loss.backward()
    if handle is not None:
        handle.remove()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("levers", [{}, {"qk_norm": True}, {"positions": "alibi"}, {"softmax": "pb-relax"}])
def test_a_model_with_it_is_the_model_without_watched_or_not(levers, monkeypatch):
    seen = []
    plain = gradients_of(tiny(**levers))
    watched = gradients_of(tiny(**levers), lambda module, args, output: seen.append(output))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert seen[0].shape == (2, 2, 48, 48)
    monkeypatch.setattr(kernels, "kernel", lambda: None)
    without = []
    for a, b in zip(
        plain, gradients_of(tiny(**levers), lambda *given: without.append(given[2])), strict=True
    ):
        assert (a - b).abs().max() <= 1e-4 * (1e-3 + b.abs().max())
    # The scores that are shown are those that the torch operations go by.
    visible = without[0].isfinite()
    assert torch.equal(visible, seen[0].isfinite())
    assert (seen[0] - without[0])[visible].abs().max() < 1e-4


@pytest.mark.parametrize(("variable", "value"), [("STABILITYLAB_NATIVE", "0"), ("CC", "/nowhere/cc")])
def test_that_there_is_no_kernel_is_said_once(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, value)
    kernels.kernel.cache_clear()
    try:
        for _ in range(3):
            assert not kernels.has_kernel(torch.ones(4))
    finally:
        kernels.kernel.cache_clear()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "half as long again" in record.getMessage()

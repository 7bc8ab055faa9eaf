"""The loss in half precision: probabilities too small for a half number still reach the weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from glm.model import vocabulary_loss as module
from glm.model.vocabulary_loss import vocabulary_loss, vocabulary_losses

V, C, N = 400, 32, 24


@pytest.fixture
def native(monkeypatch):
    """As on a machine that multiplies half numbers: the logits' gradient is an operand, hence half."""
    monkeypatch.setattr(module, "upcasts", lambda x: False)


def inputs(dtype, gap):
    """Hidden states and weights whose softmax leaves about e^-gap to each token but the target."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator) / 8
    weight = torch.randn(V, C, generator=generator) / 8
    hidden[:, 0], weight[:, 0] = 4.0, -gap / 4
    weight[3, 0] = 0.0
    target = torch.full((N,), 3)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def test_small_probabilities_are_not_lost_in_fp16(native, monkeypatch):
    # e^-19 = 6e-9 is below half of fp16's smallest number, 3e-8. Lifted by 2^12 it is a normal one: relative error 2^-11.
    scale = 2.0**16
    hidden, weight, target = inputs(torch.float16, 19.0)
    (scale * vocabulary_loss(hidden, weight, target)).backward()
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    (scale * F.cross_entropy(h @ w.T, target, reduction="sum")).backward()
    others = torch.arange(V) != 3
    # Logits are rounded to fp16 before the softmax: at 19 by 2^-7, which moves a probability by as much.
    error = (weight.grad.double() - w.grad)[others].abs()
    assert (error <= 2.0**-6 * w.grad[others].abs().amax()).all()
    assert (weight.grad[others][:, 0] != 0).all()
    # Not lifted, no loss scale brings them back.
    weight.grad = None
    monkeypatch.setattr(module, "LIFT", 1.0)
    (scale * vocabulary_loss(hidden, weight, target)).backward()
    assert not weight.grad[others].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_native_half_gradients_are_float64s(native, dtype, z_loss):
    hidden, weight, target = inputs(dtype, 2.0)
    loss = vocabulary_loss(hidden, weight, target, z_loss)
    (8.0 * loss).backward()
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = h @ w.T
    exact = F.cross_entropy(logits, target, reduction="sum") + z_loss * logits.logsumexp(1).square().sum()
    (8.0 * exact).backward()
    # Four roundings to half: logits (of size up to 8), their gradient, the result; and the logits' error moves the softmax.
    u = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    assert loss.item() == pytest.approx(exact.item(), rel=16 * u)
    _, of_z = vocabulary_losses(hidden, weight, target, z_loss)
    assert of_z.item() == pytest.approx(
        z_loss * float(logits.detach().logsumexp(1).square().sum()), rel=16 * u
    )
    assert not of_z.requires_grad
    for ours, theirs in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        assert (ours.double() - theirs).abs().max() <= 16 * u * theirs.abs().max()


def test_a_token_that_is_every_rows_target_does_not_overflow(native):
    # Its gradient sums to N h: lifted by 2^12 that would be beyond fp16, but products are kept in fp32.
    hidden, weight, target = inputs(torch.float16, -8.0)
    vocabulary_loss(hidden, weight, target).backward()
    assert torch.isfinite(weight.grad).all()
    assert weight.grad[3].abs().max() > 65504 / 2**12

"""The compiled RMSNorm against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from glm.precision import rms, rms_norm

EPSILON = 1e-5


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("gains", [None, 1, "all"])
@pytest.mark.parametrize("shape", [(7, 130), (2, 3, 128), (1, 1), (300, 5)])
def test_values_and_gradients(shape, gains, compiled, monkeypatch):
    if compiled and rms.kernel() is None:
        pytest.skip("no C compiler")
    if not compiled:
        monkeypatch.setattr(rms, "kernel", lambda: None)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[0]).view(
        -1, *(1,) * (len(shape) - 1)
    )
    grad = torch.randn(shape, generator=generator)
    size = {None: 0, 1: 1, "all": shape[-1]}[gains]
    gain = torch.randn(size, generator=generator) if size else None

    def run(dtype):
        a = x.to(dtype, copy=True).requires_grad_()
        g = None if gain is None else gain.to(dtype, copy=True).requires_grad_()
        y = rms_norm(a, g, EPSILON)
        y.backward(grad.to(dtype))
        return y.detach(), a.grad, *(() if g is None else (g.grad,))

    rows = x.numel() // shape[-1]
    # Sums of C numbers, and of N for the gain's gradient; terms of dx cancel, each no larger than r |g| |dy| sqrt(C).
    inverse = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPSILON)
    largest = (grad * (1 if gain is None else gain)).double().norm(dim=-1, keepdim=True) * inverse
    y, dx, *dg = run(torch.float32)
    exact_y, exact_dx, *exact_dg = run(torch.float64)
    unit = 2.0**-24
    assert ((y - exact_y).abs() <= (shape[-1] / 2 + 8) * unit * exact_y.abs()).all()
    assert ((dx - exact_dx).abs() <= (2 * shape[-1] + 16) * unit * largest).all()
    for mine, exact in zip(dg, exact_dg, strict=True):
        terms = (grad.double() * x.double() * inverse).abs()
        bound = terms.sum() if gains == 1 else terms.reshape(rows, -1).sum(0)
        assert ((mine - exact).abs() <= (rows + 2 * shape[-1] + 16) * unit * bound).all()


def test_what_is_no_number_stays_none():
    x = torch.ones(3, 16)
    x[0, 0], x[1, 0] = torch.nan, torch.inf
    y = rms_norm(x, torch.ones(16), EPSILON)
    assert y[0].isnan().all()
    assert y[1, 0].isnan()
    assert y[1, 1:].eq(0).all()
    assert y[2].isfinite().all()


def test_a_matrix_with_gaps_and_none_at_all():
    x = torch.randn(8, 64)
    assert torch.equal(rms_norm(x[:, ::2], None, EPSILON), rms_norm(x[:, ::2].contiguous(), None, EPSILON))
    assert rms_norm(torch.empty(0, 4), None, EPSILON).shape == (0, 4)

"""Heads gated by the compiled kernel against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from glm.precision import gate, gated_heads


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("heads", "width"), [(4, 16), (1, 7), (3, 33)])
def test_values_and_gradients(heads, width, compiled, monkeypatch):
    if compiled and gate.kernel() is None:
        pytest.skip("no C compiler")
    if not compiled:
        monkeypatch.setattr(gate, "kernel", lambda: None)
    generator = torch.Generator().manual_seed(0)
    z, m, up = (
        torch.randn(2, 5, size, generator=generator) * 3 for size in (heads, heads * width, heads * width)
    )
    z[0, 0, 0], z[0, 1, 0] = 200.0, -200.0

    def run(dtype):
        a, b = (one.to(dtype, copy=True).requires_grad_() for one in (z, m))
        y = gated_heads(a, b)
        y.backward(up.to(dtype))
        return y.detach(), a.grad, b.grad

    unit = 2.0**-24
    y, dz, dm = run(torch.float32)
    exact_y, exact_dz, exact_dm = run(torch.float64)
    # exp's argument is rounded: its relative error, and that of s, is |z| of them and the exponential's own.
    factor = (z.double().abs() + 8) * unit
    wide = factor.repeat_interleave(width, -1)
    tiny = torch.finfo(torch.float32).tiny
    assert ((y - exact_y).abs() <= wide * exact_y.abs() + tiny).all()
    assert ((dm - exact_dm).abs() <= wide * exact_dm.abs() + tiny).all()
    s = torch.sigmoid(z.double())
    terms = (up.double() * m.double()).abs().view(2, 5, heads, width).sum(-1) * s
    # 1 - s cancels.
    assert ((dz - exact_dz).abs() <= (width + 8) * unit * terms + 2 * factor * terms + tiny).all()
    assert dz.isfinite().all()

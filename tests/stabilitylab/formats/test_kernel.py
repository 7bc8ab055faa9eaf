"""The compiled rounding against the torch operations, to the bit: every format, layout and rounding, NaN and infinities."""

from __future__ import annotations

import pytest
import torch

from stabilitylab.formats import SCALED_FORMATS, block_scaled, fake_quantize, rotate, rotation_signs
from stabilitylab.formats.kernel import is_kernels, kernel

pytestmark = pytest.mark.skipif(kernel() is None, reason="no C compiler")
SCALED = [name for name, one in SCALED_FORMATS.items() if one.scale != "none" and one.element.bits <= 8]


def matrix(rows, columns):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-42, 38, rows)[:, None]
    x[1::3] = torch.randn(x[1::3].shape, generator=generator)
    x[2] = 0
    x[3, :5] = -0.0
    return x


def by_torch(monkeypatch, *arguments, **named):
    with monkeypatch.context() as patch:
        patch.setattr(block_scaled, "is_kernels", lambda *given: False)
        return fake_quantize(*arguments, **named)


def bits(x):
    return torch.where(x.isnan(), torch.nan, x).contiguous().view(torch.int32)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", [*SCALED, "fp8-e5m2-tile5", "fp8-e4m3-block7"])
def test_bits_are_those_of_torch_operations(name, rounding, monkeypatch):
    for rows, columns in ((12, 1300), (150, 33), (7, 1)):
        x = matrix(rows, columns)
        broken = x.clone()
        broken[0, 0], broken[-1, -1], broken[rows // 2, 0] = torch.inf, torch.nan, -torch.inf
        for given in (
            x,
            x.t(),
            x.view(1, rows, columns),
            x[:, ::2],
            broken,
            broken.t(),
            x.double(),
            x.bfloat16(),
        ):
            one, other = (torch.Generator().manual_seed(1) for _ in range(2))
            kind = block_scaled.scaled_format(name)
            assert is_kernels(given, kind.element, kind.scale, kind.block)
            mine = fake_quantize(given, name, rounding=rounding, generator=one)
            torchs = by_torch(monkeypatch, given, name, rounding=rounding, generator=other)
            assert mine.shape == torchs.shape
            assert torch.equal(bits(mine), bits(torchs)), (name, given.shape)


def test_what_is_transposed_stays_so():
    x = matrix(64, 32)
    assert fake_quantize(x.t(), "mxfp4").t().is_contiguous()
    signs = rotation_signs(16, seed=0)
    turned = rotate(x[4:36].t(), signs)
    assert turned.t().is_contiguous()
    # Sums of sixteen products in another order.
    torch.testing.assert_close(turned, rotate(x[4:36].t().contiguous(), signs), rtol=2.0**-20, atol=1e-38)


def test_the_kernel_leaves_alone_what_it_cannot_do(monkeypatch):
    e4m3, wide = block_scaled.scaled_format("fp8-e4m3-row"), torch.ones(2, 20_000)
    assert not is_kernels(wide, e4m3.element, e4m3.scale, e4m3.block)
    assert is_kernels(wide, e4m3.element, e4m3.scale, (None, None))
    x = torch.randn(4, 32, requires_grad=True)
    assert not is_kernels(x, e4m3.element, e4m3.scale, e4m3.block)
    assert torch.equal(fake_quantize(x, "fp8-e4m3-row"), by_torch(monkeypatch, x, "fp8-e4m3-row"))

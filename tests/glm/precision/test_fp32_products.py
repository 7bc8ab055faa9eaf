"""fp32 products and attention on a CPU, which are not torch's own calls, beside the same in fp64, which are."""

from __future__ import annotations

import importlib

import pytest
import torch

from glm.precision import attention_scores, linear, softmax_matmul

# The package has a function of that name.
matmul = importlib.import_module("glm.precision.matmul")


@pytest.mark.parametrize("bias", [True, False])
def test_fp32_products_are_those_of_fp64_within_rounding(bias):
    """Products and their gradients; a sum over n terms is off by at most n 2^-24 of the sum of magnitudes."""
    g = torch.Generator().manual_seed(2)
    x, w = torch.randn(3, 50, 24, generator=g), torch.randn(40, 24, generator=g)
    b = torch.randn(40, generator=g) if bias else None
    up = torch.randn(3, 50, 40, generator=g)

    def run(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b) if t is not None]
        y = linear(*leaves)
        return [y, *torch.autograd.grad(y, leaves, up.to(dtype))]

    for ours, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=150 * 2.0**-24 * 16)


def test_a_part_of_a_wider_matrix_is_multiplied_by_the_same_code(monkeypatch):
    """oneDNN's code for matrices with gaps is hundreds of times slower, so it never gets one."""
    given = []
    plain = torch.ops.mkldnn._linear_pointwise

    def seen(a, b, *rest):
        given.extend((a, b))
        return plain(a, b, *rest)

    monkeypatch.setattr(matmul.torch.ops.mkldnn, "_linear_pointwise", seen)
    x, w = torch.randn(50, 40)[:, :24], torch.randn(40, 40)[:, :24].requires_grad_()
    y = linear(x, w)
    y.backward(torch.randn(50, 64)[:, :40])
    assert torch.equal(y, linear(x.contiguous(), w.contiguous()))
    assert given
    assert all(one.is_contiguous() or one.mT.is_contiguous() for one in given)


def test_fp32_attention_is_that_of_fp64_within_rounding():
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, 17, 8, generator=g) for _ in range(3))
    bias = torch.zeros(2, 1, 17, 17).masked_fill(torch.ones(17, 17).tril() == 0, -torch.inf)
    up = torch.randn(2, 3, 17, 8, generator=g)

    def run(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        y = softmax_matmul(attention_scores(*leaves[:2], bias.to(dtype), 0.2, 2.5), leaves[2])
        return [y, *torch.autograd.grad(y, leaves, up.to(dtype))]

    for ours, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=17 * 8 * 2.0**-24 * 8)

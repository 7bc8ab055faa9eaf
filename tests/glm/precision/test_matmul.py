"""Products of half operands against float64, within the bound that the module states.

With u the half format's unit roundoff, v = 2^-24 and t its smallest subnormal, a product over n terms satisfies
|y - exact| <= u |y| + n v sum |a_i b_i| + t / 2 to first order; each bound here is that, twice where second order is left out.
"""

from __future__ import annotations

import pytest
import torch

from glm.precision import fused_attention, half_units, linear, matmul, softmax_matmul, wide_product

V = 2.0**-24
HALVES = {torch.float16: (2.0**-11, 2.0**-24), torch.bfloat16: (2.0**-8, 2.0**-133)}
FORMATS = pytest.mark.parametrize("dtype", list(HALVES), ids=str)


@pytest.fixture(autouse=True)
def no_units(monkeypatch):
    """As on a CPU without units for half numbers; with such units, rounding is up to the library."""
    monkeypatch.setattr(half_units, "NATIVE_DTYPES", frozenset())


def draw(*shape, dtype, seed, spread=3.0):
    """Numbers of sizes from e^-spread to e^spread."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * (2 * torch.rand(shape, generator=generator) - 1))
    return (sizes * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()


def within(y, exact, absolute, terms, dtype, *, slack=1.0):
    """Element by element; ``absolute`` is sum |a_i b_i|."""
    u, smallest = HALVES[dtype]
    bound = u * exact.abs() + terms * V * absolute + smallest / 2
    assert (2 * slack * bound - (y.double() - exact).abs()).min() >= 0


@FORMATS
def test_linear_and_its_gradients(dtype):
    x, w, b = (draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(3, 20, 64), (48, 64), (48,)]))
    g = draw(3, 20, 48, dtype=dtype, seed=9).detach()
    y = linear(x, w, b)
    y.backward(g)
    X, W, B, G = (t.detach().double() for t in (x, w, b, g))
    within(y, X @ W.T + B, X.abs() @ W.abs().T + B.abs(), 65, dtype)
    within(x.grad, G @ W, G.abs() @ W.abs(), 48, dtype)
    flat_g, flat_x = G.reshape(-1, 48), X.reshape(-1, 64)
    within(w.grad, flat_g.T @ flat_x, flat_g.abs().T @ flat_x.abs(), 60, dtype)
    within(b.grad, flat_g.sum(0), flat_g.abs().sum(0), 60, dtype)
    assert {t.dtype for t in (y, x.grad, w.grad, b.grad)} == {dtype}


@FORMATS
@pytest.mark.parametrize("widen", [False, True])
def test_matmul_and_its_gradients(dtype, widen):
    a, b = draw(2, 3, 20, 32, dtype=dtype, seed=0), draw(2, 3, 32, 24, dtype=dtype, seed=1)
    y = matmul(a, b, widen=widen)
    g = draw(2, 3, 20, 24, dtype=dtype, seed=2).detach()
    y.backward(g.to(y.dtype))
    A, B, G = (t.detach().double() for t in (a, b, g))
    assert y.dtype == (torch.float32 if widen else dtype)
    assert torch.equal(y.to(dtype).to(y.dtype), y)  # widened, it is still the rounded product
    within(y, A @ B, A.abs() @ B.abs(), 32, dtype)
    within(a.grad, G @ B.mT, G.abs() @ B.abs().mT, 24, dtype)
    within(b.grad, A.mT @ G, A.abs().mT @ G.abs(), 20, dtype)


@FORMATS
def test_softmax_matmul_and_its_gradients(dtype):
    """The weights P are operands, hence rounded: |dP| <= u P + t / 2. That comes on top of the product's own bound."""
    generator = torch.Generator().manual_seed(0)
    s = (3 * torch.randn(2, 3, 20, 32, generator=generator)).requires_grad_()
    v = draw(2, 3, 32, 16, dtype=dtype, seed=1, spread=1.0)
    g = draw(2, 3, 20, 16, dtype=dtype, seed=2, spread=1.0).detach()
    y = softmax_matmul(s, v)
    y.backward(g)
    S = s.detach().double().requires_grad_()
    P, W, G = S.softmax(-1), v.detach().double(), g.double()
    P.retain_grad()
    (P @ W).backward(G)
    u, smallest = HALVES[dtype]
    P_ = P.detach()
    moved = u * P_ + smallest / 2  # bound of the rounding of P; fp32's softmax errs by some V, far below
    exact = P_ @ W
    error = (y.detach().double() - exact).abs()
    assert (2 * (u * exact.abs() + moved @ W.abs() + 32 * V * (P_ @ W.abs())) - error).min() >= 0
    exact = P_.mT @ G
    error = (v.grad.double() - exact).abs()
    bound = u * exact.abs() + moved.mT @ G.abs() + 20 * V * (P_.mT @ G.abs()) + smallest / 2
    assert (2 * bound - error).min() >= 0
    # dS = P (dP - sum P dP) with the rounded P in both places.
    dP = (G.abs() @ W.abs().mT) + 16 * V * (G.abs() @ W.abs().mT)
    bound = moved * (dP + (P_ * dP).sum(-1, keepdim=True)) + P_ * (moved * dP).sum(-1, keepdim=True)
    bound += 64 * V * P_ * (dP + (P_ * dP).sum(-1, keepdim=True))
    assert (2 * bound - (s.grad.double() - S.grad).abs()).min() >= 0


@FORMATS
@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_is_rounded_once(dtype, causal):
    """Computed in fp32: beside the one rounding, softmax and two products err by a hundred V of what they sum up."""
    q, k, v = (draw(2, 3, 20, 16, dtype=dtype, seed=i, spread=0.5) for i in range(3))
    seen = torch.ones(20, 20, dtype=torch.bool).tril()
    bias = torch.zeros(20, 20).masked_fill(~seen, -torch.inf)
    y = fused_attention(q, k, v, None if causal else bias)
    g = draw(2, 3, 20, 16, dtype=dtype, seed=5, spread=0.5).detach()
    y.backward(g)
    Q, K, W = (t.detach().double().requires_grad_() for t in (q, k, v))
    P = (Q @ K.mT / 4 + bias.double()).softmax(-1)
    exact = P @ W
    exact.backward(g.double())
    assert y.dtype == dtype
    u, smallest = HALVES[dtype]
    for ours, theirs in ((y, exact), (q.grad, Q.grad), (k.grad, K.grad), (v.grad, W.grad)):
        bound = u * theirs.abs() + 1000 * V * theirs.abs().max() + smallest / 2
        assert (bound - (ours.double() - theirs).abs()).min() >= 0


@FORMATS
def test_a_wide_product_is_not_rounded(dtype):
    a, b = (draw(*shape, dtype=dtype, seed=i).detach() for i, shape in enumerate([(30, 40), (40, 20)]))
    y = wide_product(a, b)
    assert y.dtype == torch.float32
    bound = 2 * 40 * V * (a.double().abs() @ b.double().abs())
    assert (bound - (y.double() - a.double() @ b.double()).abs()).min() >= 0
    wide = a.double()
    assert torch.equal(wide_product(wide, b.double()), wide @ b.double())

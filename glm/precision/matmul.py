"""Products of half-precision operands with fp32 accumulation, on any machine.

A tensor core multiplies half operands, accumulates in fp32 and rounds the result to half once. A CPU with the matching instructions
(AMX, AVX512-BF16, AVX512-FP16) does the same natively. One without them falls into scalar code that is several times slower than
its own fp32 product. There this module does what the tensor core does: it upcasts the operands, multiplies in fp32 and rounds once.
The rule looks at CPU capability flags, never at timings, so the same machine always takes the same path and a run repeats bit for
bit.

Rounding: with unit roundoff u of the half format and v = 2^-24 of fp32, a product over n terms satisfies
|y - exact| <= u |y| + n v sum |a_i b_i| to first order, plus half the smallest subnormal where y is tiny.

``attention_scores`` and ``softmax_matmul`` are the two halves of attention under the same rule: the softmax is in fp32, and its
weights on the values are an operand, hence half. Where it upcasts, the backward pass keeps those half weights and nothing else of
the scores' size. On a CPU each pass over a tensor of the scores' size costs as much as the products, so there are as few as
possible: queries and keys take up constants, and the term that the softmax subtracts from its gradient is a product of outputs
(FlashAttention, 2205.14135, appendix B.4):

    S = c q k' + bias,  Y = P V,  P = softmax(S)
    dV = P' dY,   dP = dY V',   dS = P * (dP - sum_j P dP),   sum_j P dP = sum_d dY Y,   dq = c dS k,   dk = dS' (c q)

oneDNN computes fp32 products of matrices on a CPU; its kernels use the widest vectors of every maker's CPU. torch's default, MKL,
does so on its own maker's only: for the matrices of a small model on an AMD CPU it takes one and a half to three times as long. The
compiled kernel, where there is one (``kernel``), computes gradients of weights, sums over all tokens.

Limits: on other devices and on capable CPUs the products are the plain torch calls, and round as that library does. Double backward
works in fp64 on a CPU only, and on other devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from glm.precision.half_units import HALF_DTYPES, upcasts
from glm.precision.kernel import sums_weights, weight_gradient
from glm.precision.recomputed import Recipe, recipe_of

# Read once, at import: inside a compiled model it is a constant.
ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with fp32 accumulation and one rounding.

    Args:
        x: [..., in], ``weight``: [out, in], ``bias``: [out], all of one dtype.
    """
    if upcasts(x) and weight.dtype == x.dtype:
        result: Tensor = _UpcastLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    if _is_onednns(x) and weight.dtype == x.dtype:
        product: Tensor = _OneDnnLinear.apply(x, weight, bias, recipe_of(x))  # type: ignore[no-untyped-call]
        return product
    return F.linear(x, weight, bias)


def _is_onednns(x: Tensor) -> bool:
    # A compiler fuses products by itself, and chooses their kernels.
    return ONEDNN and _is_eager_fp32(x) and x.numel() > 0


def _is_eager_fp32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias`` of fp32 matrices."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), bias, "none", [], "")
    return product


def _dense(x: Tensor) -> Tensor:
    """x without gaps between rows or columns: for a part of a wider matrix oneDNN has only reference code, 500 times slower."""
    return x if x.is_contiguous() or (x.dim() == 2 and x.t().is_contiguous()) else x.contiguous()


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in fp32, or in its own format if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def matmul(a: Tensor, b: Tensor, *, widen: bool = False) -> Tensor:
    """Batched ``a @ b`` (equal leading shapes) with fp32 accumulation and one rounding.

    Args:
        widen: return the rounded result in fp32 (or wider), for arithmetic that must not be in half precision.
    """
    if upcasts(a) and b.dtype == a.dtype:
        result: Tensor = _UpcastMatmul.apply(a, b, widen)  # type: ignore[no-untyped-call]
        return result
    product = torch.matmul(a, b)
    return at_least_fp32(product) if widen else product


def attention_scores(q: Tensor, k: Tensor, bias: Tensor, scale: float, divisor: float) -> Tensor:
    """``divisor * ((scale * q) k') + bias`` in fp32 (or wider), after rounding the product to the format of q and k.

    Args:
        q: [..., queries, width], ``k``: [..., keys, width], equal leading shapes.
        bias: broadcast over the scores.
    """
    if _is_eager_fp32(q):
        result: Tensor = _Scores.apply(q, k, bias, scale, divisor)  # type: ignore[no-untyped-call]
        return result
    return torch.add(bias, matmul(q * scale, k.transpose(-1, -2), widen=True), alpha=divisor)


def softmax_matmul(scores: Tensor, values: Tensor) -> Tensor:
    """``softmax(scores) @ values`` in the format of the values, the softmax in that of the scores.

    Args:
        scores: [..., queries, keys], ``values``: [..., keys, width], equal leading shapes.
    """
    if upcasts(values) and scores.dtype == torch.float32:
        result: Tensor = _UpcastSoftmaxMatmul.apply(scores, values)  # type: ignore[no-untyped-call]
        return result
    if scores.dtype == torch.float32 and _is_eager_fp32(values):
        mixed: Tensor = _SoftmaxMatmul.apply(scores, values)  # type: ignore[no-untyped-call]
        return mixed
    return matmul(scores.softmax(-1).to(values.dtype), values)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """``softmax(q k' / sqrt(D) + bias) v`` without holding the scores; in fp32 and rounded once where half products are.

    Where it upcasts, its backward pass keeps q, k, v and the result in fp32, and does not round the weights on v.

    Args:
        q: [B, H, T, D], ``k``, ``v``: [B, H, S, D].
        bias: added to the scores, in their compute format; None: causal.
    """
    dtype = q.dtype
    if upcasts(q):
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None).to(dtype)


def wide_product_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """``a' @ b`` of matrices, as ``wide_product``."""
    if sums_weights(a, b):
        return weight_gradient(a, b, bias=False)[0]
    return wide_product(a.t(), b)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of matrices in fp32 (or wider), as accumulated and not rounded to half."""
    if a.dtype not in HALF_DTYPES:
        return _onednn(a, b.t()) if _is_onednns(a) and b.numel() else a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return _fp32_linear(a.float(), b.float().t())


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe | None) -> Tensor:
        ctx.make = None if recipe is None else recipe.make
        ctx.save_for_backward(weight, *((x,) if recipe is None else recipe.given))
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        weight, *given = ctx.saved_tensors
        grad_NO = grad_y.reshape(-1, weight.shape[0])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _onednn(grad_NO, weight.t()).view(*grad_y.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            x = given[0] if ctx.make is None else ctx.make(*given)
            x_NI = x.reshape(-1, weight.shape[1])
            if sums_weights(grad_NO, x_NI):
                return grad_x, *weight_gradient(grad_NO, x_NI, bias=ctx.needs_input_grad[2]), None
            # x' g rather than g' x: the kernels are faster with the longer side in their vectors.
            grad_weight = _onednn(x_NI.t(), grad_NO.t()).t()
        if ctx.needs_input_grad[2]:
            grad_bias = grad_NO.sum(0)
        return grad_x, grad_weight, grad_bias, None


class _UpcastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide_bias = None if bias is None else bias.float()
        return _fp32_linear(x.float(), weight.float(), wide_bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide_NO = grad_y.float().reshape(-1, weight.shape[0])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _fp32_linear(wide_NO, weight.float().t()).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            x_NI = x.float().reshape(-1, weight.shape[1])
            if sums_weights(wide_NO, x_NI):
                grad_weight, grad_bias = weight_gradient(wide_NO, x_NI, bias=ctx.needs_input_grad[2])
            else:
                grad_weight = _fp32_linear(x_NI.t(), wide_NO.t()).t()
            grad_weight = grad_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = (wide_NO.sum(0) if grad_bias is None else grad_bias).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


def _fp32_linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias`` in fp32 by the quickest library."""
    return _onednn(a, b, bias) if _is_onednns(a) and b.numel() else F.linear(a, b, bias)


class _UpcastMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, widen: bool) -> Tensor:
        ctx.save_for_backward(a, b)
        product = torch.matmul(a.float(), b.float())
        rounded = product.to(a.dtype)
        return product.copy_(rounded) if widen else rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        # A widened result's gradient is an operand here, hence half, as where half products are native.
        wide = grad.to(a.dtype).float()
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = torch.matmul(wide, b.float().transpose(-1, -2)).to(a.dtype)
        if ctx.needs_input_grad[1]:
            grad_b = torch.matmul(a.float().transpose(-1, -2), wide).to(b.dtype)
        return grad_a, grad_b, None


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, bias: Tensor, scale: float, divisor: float) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.factor = scale * divisor
        product = torch.matmul(q * scale, k.transpose(-1, -2))
        return torch.add(bias, product, alpha=divisor, out=product)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        q, k = ctx.saved_tensors
        grad_q = torch.matmul(grad, k).mul_(ctx.factor)
        return grad_q, torch.matmul(grad.transpose(-1, -2), q * ctx.factor), None, None, None


class _SoftmaxMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, values: Tensor) -> Tensor:
        weights = scores.softmax(-1)
        mixed = torch.matmul(weights, values)
        ctx.save_for_backward(weights, values, mixed)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weights, values, mixed = ctx.saved_tensors
        taken_off = (grad * mixed).sum(-1, keepdim=True)
        grad_scores = torch.matmul(grad, values.transpose(-1, -2)).sub_(taken_off).mul_(weights)
        return grad_scores, torch.matmul(weights.transpose(-1, -2), grad)


class _UpcastSoftmaxMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, values: Tensor) -> Tensor:
        weights = scores.softmax(-1)
        rounded = weights.to(values.dtype)
        ctx.save_for_backward(rounded, values)
        return torch.matmul(weights.copy_(rounded), values.float()).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rounded, values = ctx.saved_tensors
        weights, wide = rounded.float(), grad.float()
        grad_values = torch.matmul(weights.transpose(-1, -2), wide).to(values.dtype)
        grad_weights = torch.matmul(wide, values.float().transpose(-1, -2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, torch.float32)
        return grad_scores, grad_values

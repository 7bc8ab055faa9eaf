"""Products of half-precision operands with fp32 accumulation, on any machine.

A tensor core multiplies half operands, accumulates in fp32 and rounds the result to half once. A CPU with the matching
instructions (AMX, AVX512-BF16, AVX512-FP16) does the same natively. One without them falls into scalar code that is
several times slower than its own fp32 product. There we do by hand what the tensor core does: upcast the operands,
multiply in fp32, round once. The rule looks at CPU capability flags, never at timings, so the same machine always takes
the same path and a run can be repeated bit for bit.

Rounding: with unit roundoff u of the half format and v = 2^-24 of fp32, a product over n terms satisfies
|y - exact| <= u |y| + n v sum |a_i b_i| to first order, plus half the smallest subnormal where y is tiny.

Limits: on other devices and on capable CPUs these functions are the plain torch calls, so the result is whatever that
library rounds. Double backward is not supported on the upcast path.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HALF_DTYPES = (torch.float16, torch.bfloat16)

# /proc/cpuinfo's names of the instructions that multiply the format natively.
NATIVE_FLAGS = {
    torch.bfloat16: frozenset({"avx512_bf16", "amx_bf16"}),
    torch.float16: frozenset({"avx512_fp16", "amx_fp16"}),
}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU as Linux lists them; empty where the system has no such list."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


@functools.cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has units for products of ``dtype``. An unknown CPU counts as one without: slower, never wrong."""
    return not cpu_flags().isdisjoint(NATIVE_FLAGS.get(dtype, frozenset()))


def upcasts(x: Tensor) -> bool:
    """Whether products of tensors like ``x`` are computed in fp32 and rounded."""
    return x.dtype in HALF_DTYPES and x.device.type == "cpu" and not multiplies_natively(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with fp32 accumulation and one rounding.

    Args:
        x: [..., in], ``weight``: [out, in], ``bias``: [out], all of one dtype.
    """
    if upcasts(x) and weight.dtype == x.dtype:
        result: Tensor = _UpcastLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return F.linear(x, weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched ``a @ b`` (equal leading shapes) with fp32 accumulation and one rounding."""
    if upcasts(a) and b.dtype == a.dtype:
        result: Tensor = _UpcastMatmul.apply(a, b)  # type: ignore[no-untyped-call]
        return result
    return torch.matmul(a, b)


class _UpcastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide_bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide_bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide_NO = grad_y.float().reshape(-1, weight.shape[0])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (wide_NO @ weight.float()).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (wide_NO.t() @ x.float().reshape(-1, weight.shape[1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = wide_NO.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


class _UpcastMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.matmul(a.float(), b.float()).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        wide = grad.float()
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = torch.matmul(wide, b.float().transpose(-1, -2)).to(a.dtype)
        if ctx.needs_input_grad[1]:
            grad_b = torch.matmul(a.float().transpose(-1, -2), wide).to(b.dtype)
        return grad_a, grad_b

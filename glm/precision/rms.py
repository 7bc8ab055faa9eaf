"""RMSNorm: ``g x / sqrt(mean x^2 + eps)`` over the last dimension, by the compiled kernel (rms.c) or by torch operations.

torch has one fused kernel for LayerNorm on a CPU and none for RMSNorm, whose eight passes made it the slower of the two. Both ways
compute in fp32 and agree up to rounding; the machine decides which of them runs, not the moment.

Limits of the kernel: fp32 on a CPU, no double backward, not under torch.compile.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glm.c_compiler import INTEGER, POINTER, loaded
from glm.precision.recomputed import with_recipe

_SOURCE = Path(__file__).with_name("rms.c")


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The loaded kernel; None where it is not available."""
    return loaded(
        _SOURCE,
        {
            "glm_rms_norm": (*(INTEGER,) * 2, ctypes.c_float, *(POINTER,) * 4),
            "glm_rms_norm_backward": (*(INTEGER,) * 2, *(POINTER,) * 6),
        },
    )


def rms_norm(x: Tensor, gain: Tensor | None, epsilon: float) -> Tensor:
    """x [..., C] over its root mean square, times the gain.

    Args:
        gain: [C] or [1], of x's format; None: 1.
    """
    usable = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    if usable and not torch.compiler.is_compiling() and kernel() is not None:
        wide = gain if gain is None or len(gain) == x.shape[-1] else gain.expand(x.shape[-1])
        y: Tensor = _RmsNorm.apply(x, wide, epsilon)  # type: ignore[no-untyped-call]
        return with_recipe(y, functools.partial(_again, epsilon), x, wide)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return y if gain is None else y * gain


def _rms_norm(x: Tensor, gain_C: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of contiguous x, and the inverse root mean squares."""
    library = kernel()
    assert library is not None
    y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
    library.glm_rms_norm(
        *(inverse.numel(), x.shape[-1], epsilon, x.data_ptr()),
        *(None if gain_C is None else gain_C.data_ptr(), y.data_ptr(), inverse.data_ptr()),
    )
    return y, inverse


def _again(epsilon: float, x: Tensor, gain_C: Tensor | None) -> Tensor:
    return _rms_norm(x.contiguous(), None if gain_C is None else gain_C.contiguous(), epsilon)[0]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_C: Tensor | None, epsilon: float) -> Tensor:
        x = x.contiguous()
        gain_C = None if gain_C is None else gain_C.contiguous()
        y, inverse = _rms_norm(x, gain_C, epsilon)
        ctx.save_for_backward(x, gain_C, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, gain_C, inverse = ctx.saved_tensors
        library = kernel()
        assert library is not None
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        grad_gain = None if gain_C is None else torch.empty_like(gain_C)
        library.glm_rms_norm_backward(
            *(inverse.numel(), x.shape[-1], x.data_ptr(), None if gain_C is None else gain_C.data_ptr()),
            *(inverse.data_ptr(), grad.data_ptr(), grad_x.data_ptr()),
            None if grad_gain is None else grad_gain.data_ptr(),
        )
        return grad_x, grad_gain, None

"""Gates attention's output by head, ``y = s(z) m``, s the logistic function: by the compiled kernel (gate.c) or torch operations.

Torch operations took 4 % of a small model's step for it, in passes over a thirtieth of a step's numbers.

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

_SOURCE = Path(__file__).with_name("gate.c")


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The loaded kernel; None where it is not available."""
    return loaded(
        _SOURCE,
        {
            "glm_gate": (*(INTEGER,) * 2, *(POINTER,) * 3),
            "glm_gate_backward": (*(INTEGER,) * 2, *(POINTER,) * 5),
        },
    )


def gated_heads(z_BTH: Tensor, mixed_BTC: Tensor) -> Tensor:
    """``s(z) m`` for every head: [B, T, C], both of one format."""
    usable = (
        z_BTH.dtype == mixed_BTC.dtype == torch.float32 and z_BTH.device.type == "cpu" and z_BTH.numel() > 0
    )
    if usable and not torch.compiler.is_compiling() and kernel() is not None:
        gated: Tensor = _Gate.apply(z_BTH, mixed_BTC)  # type: ignore[no-untyped-call]
        return gated
    heads = mixed_BTC.view(*z_BTH.shape, mixed_BTC.shape[-1] // z_BTH.shape[-1])
    return (heads * torch.sigmoid(z_BTH)[..., None]).flatten(-2)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, mixed: Tensor) -> Tensor:
        library = kernel()
        assert library is not None
        z, mixed = z.contiguous(), mixed.contiguous()
        y = torch.empty_like(mixed)
        library.glm_gate(z.numel(), mixed.numel() // z.numel(), z.data_ptr(), mixed.data_ptr(), y.data_ptr())
        ctx.save_for_backward(z, mixed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        z, mixed = ctx.saved_tensors
        library = kernel()
        assert library is not None
        grad, grad_z, grad_mixed = grad.contiguous(), torch.empty_like(z), torch.empty_like(mixed)
        library.glm_gate_backward(
            *(z.numel(), mixed.numel() // z.numel(), z.data_ptr(), mixed.data_ptr(), grad.data_ptr()),
            *(grad_z.data_ptr(), grad_mixed.data_ptr()),
        )
        return grad_z, grad_mixed

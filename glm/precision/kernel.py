"""The compiled kernel (kernel.c): attention over heads, gated GELU, losses of logits, gradients of weights; on a CPU.

For small models torch's batched products of 16-wide heads run at a fifth of the processor's speed, and every pass over the scores
or over the inner tensors of a feed-forward layer costs as much as the products do. The first use builds the kernel
(``glm.c_compiler``). Without a compiler, or with ``STABILITYLAB_NATIVE=0``, the torch operations of ``matmul`` compute the same up
to rounding, and a step of glm-tiny takes half as long again, which the log says once. The machine decides which of the two runs,
not the moment.

Attention and gated GELU take half formats as well where the CPU has no units for them: they compute in fp32, and round where a half
kernel would round.

Shapes: B rows, T tokens, H heads, D dimensions a head; G groups of R turned pairs (``glm.model.positions``).

Limits: on a CPU, one piece of text a row of B with as many keys as queries, no double backward; losses and gradients of weights in
fp32 only.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glm.c_compiler import SWITCH, built, switched_off
from glm.precision.half_units import upcasts
from glm.precision.recomputed import with_recipe

_log = logging.getLogger("glm")
_SOURCE = Path(__file__).with_name("kernel.c")
_FLAGS = ("-std=gnu11", "-ffp-contract=fast")
# The kernel's BLOCK: queries whose scores it holds together.
_BLOCK = 48
_SLOWER = "torch operations train on this processor, and a step of a small model takes half as long again"
# Columns of a product that the kernel wants at least, whatever the processor.
_LEAST = 16
# The kernel's numbers of the formats.
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Attention(ctypes.Structure):
    """One call; attention.h explains the fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "width")),
        *((name, ctypes.c_void_p) for name in ("qkv", "cosine", "sine")),
        *((name, ctypes.c_int64) for name in ("groups", "pairs", "turn_stride")),
        ("bias", ctypes.c_void_p),
        ("bias_stride", ctypes.c_int64 * 3),
        ("scale", ctypes.c_float),
        ("divisor", ctypes.c_float),
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weights", "mixed", "grad", "grad_qkv", "largest", "seen")),
    )


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The loaded kernel; None where it is not available."""
    if switched_off():
        _log.warning("%s=0: %s", SWITCH, _SLOWER)
        return None
    try:
        library = ctypes.CDLL(str(built(_SOURCE, _FLAGS)))
        for name in ("glm_attention", "glm_attention_backward"):
            function = getattr(library, name)
            function.argtypes, function.restype = (ctypes.c_void_p,), ctypes.c_int
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        for name, arguments in {
            "glm_weight_gradient": (*(integer,) * 3, *(pointer,) * 4),
            "glm_gated_gelu": (integer, integer, *(pointer,) * 3),
            "glm_gated_gelu_backward": (integer, integer, *(pointer,) * 4),
            "glm_half_gelu": (*(integer,) * 3, *(pointer,) * 2),
            "glm_half_gelu_backward": (*(integer,) * 3, *(pointer,) * 3),
            "glm_cross_entropy": (integer, integer, pointer, pointer, ctypes.c_float, pointer),
        }.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        _log.warning(
            "no compiled kernel (%s): %s; a C compiler (cc, gcc or clang) on the path, or named by CC, is all that it takes",
            " ".join(str(error).split()),
            _SLOWER,
        )
        return None
    return library


def _library() -> ctypes.CDLL:
    library = kernel()
    assert library is not None, "ask has_kernel first"
    return library


def has_kernel(x: Tensor, *, half: bool = False) -> bool:
    """Whether the kernel computes with tensors like ``x``, here and now.

    Args:
        half: in half formats too, where the CPU has no units for them.
    """
    return (
        (x.dtype == torch.float32 or (half and upcasts(x)))
        and x.device.type == "cpu"
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and kernel() is not None
    )


def attention(
    qkv_BT3HD: Tensor,
    turned: tuple[Tensor, Tensor] | None,
    bias: Tensor,
    scale: float,
    divisor: float,
    largest_BH: Tensor | None = None,
) -> Tensor:
    """``softmax(divisor (scale R q)(R k)' + bias) v`` for every head, [B, T, H D]. ``has_kernel(..., half=True)`` must hold.

    Args:
        qkv_BT3HD: queries, keys and values.
        turned: cosines and sines of R, [B or 1, 1, T, G, R] each; None: no rotation.
        bias: [B or 1, H or 1, T, T]; it gets no gradient.
        largest_BH: fp32; filled with the largest score of each row and head. None: not needed.
    """
    mixed: Tensor = _Heads.apply(qkv_BT3HD, turned, bias, scale, divisor, largest_BH)  # type: ignore[no-untyped-call]
    return mixed


def sums_weights(grad_NO: Tensor, x_NI: Tensor) -> bool:
    """Whether ``weight_gradient`` takes these."""
    return x_NI.shape[1] >= _LEAST and has_kernel(x_NI) and has_kernel(grad_NO)


def weight_gradient(grad_NO: Tensor, x_NI: Tensor, *, bias: bool) -> tuple[Tensor, Tensor | None]:
    """``g' x`` and, if wanted, the sum of g over N. ``sums_weights`` must hold."""
    grad_NO, x_NI = grad_NO.contiguous(), x_NI.contiguous()
    weight, summed = grad_NO.new_empty(grad_NO.shape[1], x_NI.shape[1]), None
    if bias:
        summed = grad_NO.new_empty(grad_NO.shape[1])
    _library().glm_weight_gradient(
        *(grad_NO.shape[0], grad_NO.shape[1], x_NI.shape[1], grad_NO.data_ptr(), x_NI.data_ptr()),
        *(weight.data_ptr(), 0 if summed is None else summed.data_ptr()),
    )
    return weight, summed


def gated_gelu(raised: Tensor) -> Tensor:
    """``a gelu(b)``, [a, b] = raised [..., 2 I]: [..., I]. ``has_kernel(..., half=True)`` must hold."""
    if raised.dtype != torch.float32:
        rounded: Tensor = _HalfGelu.apply(raised)  # type: ignore[no-untyped-call]
        return rounded
    again = _GateAgain()
    gated: Tensor = _GatedGelu.apply(raised, again)  # type: ignore[no-untyped-call]
    return with_recipe(gated, again, raised)


def losses(logits_NV: Tensor, target_N: Tensor, z_loss: float) -> Tensor:
    """Cross-entropy and z-loss of each row, [N]; the logits are overwritten by their gradient. ``has_kernel`` must hold."""
    assert logits_NV.is_contiguous()
    assert target_N.is_contiguous()
    assert target_N.dtype == torch.int64
    loss_N = logits_NV.new_empty(logits_NV.shape[0])
    _library().glm_cross_entropy(
        *(*logits_NV.shape, logits_NV.data_ptr(), target_N.data_ptr(), z_loss, loss_N.data_ptr())
    )
    return loss_N


def _gate(raised: Tensor, cumulated: Tensor | None = None) -> Tensor:
    """``a gelu(b)``; ``cumulated`` is filled with the normal distribution's F(b)."""
    inner = raised.shape[-1] // 2
    gated = raised.new_empty(*raised.shape[:-1], inner)
    into = None if cumulated is None else cumulated.data_ptr()
    _library().glm_gated_gelu(gated.numel() // inner, inner, raised.data_ptr(), gated.data_ptr(), into)
    return gated


def _gate_and_cumulated(raised: Tensor) -> tuple[Tensor, Tensor]:
    cumulated = raised.new_empty(*raised.shape[:-1], raised.shape[-1] // 2)
    return _gate(raised, cumulated), cumulated


class _GateAgain:
    """Gated GELU in the backward pass, computed once for two uses: the next layer's, then its own gradient's."""

    def __init__(self) -> None:
        self._cumulated: Tensor | None = None

    def __call__(self, raised: Tensor) -> Tensor:
        gated, self._cumulated = _gate_and_cumulated(raised.contiguous())
        return gated

    def cumulated(self, raised: Tensor) -> Tensor:
        """F(b)."""
        found, self._cumulated = self._cumulated, None
        return _gate_and_cumulated(raised)[1] if found is None else found


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raised: Tensor, again: _GateAgain) -> Tensor:
        raised = raised.contiguous()
        ctx.save_for_backward(raised)
        ctx.again = again
        return _gate(raised)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (raised,) = ctx.saved_tensors
        cumulated = ctx.again.cumulated(raised)
        grad, into = grad.contiguous(), torch.empty_like(raised)
        inner = cumulated.shape[-1]
        _library().glm_gated_gelu_backward(
            *(cumulated.numel() // inner, inner, raised.data_ptr(), cumulated.data_ptr()),
            *(grad.data_ptr(), into.data_ptr()),
        )
        return into, None


class _HalfGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raised: Tensor) -> Tensor:
        raised = raised.contiguous()
        ctx.save_for_backward(raised)
        gated = raised.new_empty(*raised.shape[:-1], raised.shape[-1] // 2)
        inner, kind = gated.shape[-1], _KINDS[raised.dtype]
        _library().glm_half_gelu(gated.numel() // inner, inner, kind, raised.data_ptr(), gated.data_ptr())
        return gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (raised,) = ctx.saved_tensors
        grad, into = grad.contiguous(), torch.empty_like(raised)
        inner, kind = grad.shape[-1], _KINDS[raised.dtype]
        _library().glm_half_gelu_backward(
            *(grad.numel() // inner, inner, kind, raised.data_ptr(), grad.data_ptr(), into.data_ptr())
        )
        return into


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        turned: tuple[Tensor, Tensor] | None,
        bias: Tensor,
        scale: float,
        divisor: float,
        largest_BH: Tensor | None,
    ) -> Tensor:
        B, T, _, H, D = qkv.shape
        qkv = qkv.contiguous()
        cosine, sine = (None, None) if turned is None else (part.float().contiguous() for part in turned)
        weights_BHTT = qkv.new_empty(B, H, T, T)
        mixed_BTHD = qkv.new_empty(B, T, H, D, dtype=torch.float32)
        seen = qkv.new_empty(B, H, -(-T // _BLOCK), 2, dtype=torch.int32)
        tensors = qkv.float(), cosine, sine, bias.float(), weights_BHTT, mixed_BTHD, seen
        _run("glm_attention", *tensors, scale, divisor, largest=largest_BH)
        mixed_BTC = mixed_BTHD.view(B, T, H * D).to(qkv.dtype)
        # In half formats the backward pass does not need it.
        kept = mixed_BTHD if qkv.dtype == torch.float32 else None
        ctx.save_for_backward(qkv, cosine, sine, weights_BHTT, kept, seen)
        ctx.factors = scale, divisor
        return mixed_BTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cosine, sine, weights_BHTT, mixed_BTHD, seen = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv, dtype=torch.float32)
        _run(
            "glm_attention_backward",
            *(qkv.float(), cosine, sine, None, weights_BHTT, mixed_BTHD, seen, *ctx.factors),
            grad=grad.float().contiguous(),
            grad_qkv=grad_qkv,
        )
        return grad_qkv.to(qkv.dtype), None, None, None, None, None


def _run(
    name: str,
    qkv: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    bias: Tensor | None,
    weights: Tensor,
    mixed: Tensor | None,
    seen: Tensor,
    scale: float,
    divisor: float,
    *,
    grad: Tensor | None = None,
    grad_qkv: Tensor | None = None,
    largest: Tensor | None = None,
) -> None:
    B, T, _, H, D = qkv.shape
    kind = _KINDS[weights.dtype]
    strides: tuple[int, ...] = (0, 0, 0)
    turns: tuple[int, ...] = (0, 0, 0)
    if bias is not None:
        bias = bias if bias.stride(3) == 1 else bias.contiguous()
        strides = tuple(
            stride if size > 1 else 0 for stride, size in zip(bias.stride()[:3], bias.shape, strict=False)
        )
    if cosine is not None:
        turns = (*cosine.shape[-2:], cosine.stride(0) if cosine.shape[0] > 1 else 0)
    at = [
        None if tensor is None else tensor.data_ptr()
        for tensor in (qkv, cosine, sine, bias, weights, mixed, grad, grad_qkv, largest, seen)
    ]
    # In the order of the fields.
    call = _Attention(B, T, H, D, *at[:3], *turns, at[3], strides, scale, divisor, kind, *at[4:])
    if getattr(_library(), name)(ctypes.addressof(call)):
        raise MemoryError("no memory for a head of attention")

"""The compiled rounding (kernel.c): a tensor to a scaled format and back in one sweep, bit for bit as the torch operations do it.

The torch operations pass some thirty times over a tensor, and copy a transposed one at each; the kernel reads it twice and writes
it once, in the order it lies in memory. It is built at first use (``stabilitylab.c_compiler``); without a compiler, or with
``STABILITYLAB_NATIVE=0``, the torch operations run.

Limits: on a CPU, elements of up to 8 bits with a scale, no gradient.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from stabilitylab.c_compiler import built, switched_off
from stabilitylab.formats.number_format import NumberFormat

_log = logging.getLogger("stabilitylab")
_SOURCE = Path(__file__).with_name("kernel.c")
_FLAGS = ("-std=gnu11", "-ffp-contract=off")
_SCALES = {"fp32": 0, "e8m0": 1, "e4m3": 2}
# Numbers across a block that the kernel's stack has room for.
_WIDEST = 16_384


class _Format(ctypes.Structure):
    """kernel.c explains the fields."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("mantissa", "bias", "largest_exponent", "scale", "round_up")),
        *((name, ctypes.c_float) for name in ("largest", "infinite", "nan")),
    )


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The loaded kernel; None where it cannot be had."""
    if switched_off():
        return None
    try:
        library = ctypes.CDLL(str(built(_SOURCE, _FLAGS)))
        library.stabilitylab_round.argtypes = (*(ctypes.c_int64,) * 4, *(ctypes.c_void_p,) * 4)
        library.stabilitylab_round.restype = None
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        _log.debug("no compiled rounding, torch operations round: %s", error)
        return None
    return library


def is_kernels(x: Tensor, element: NumberFormat, scale: str, block: tuple[int | None, int | None]) -> bool:
    """Whether ``rounded`` takes this tensor."""
    rows, columns = block
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and scale != "none"
        and element.bits <= 8
        and x.numel() > 0
        and x.dim() > 0
        and (rows is columns is None or max(columns or x.shape[-1], rows or x.shape[0]) <= _WIDEST)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and kernel() is not None
    )


def rounded(
    x: Tensor,
    element: NumberFormat,
    scale: str,
    block: tuple[int | None, int | None],
    *,
    round_up: bool,
    drawn: Tensor | None,
) -> Tensor:
    """x in fp32 on the format's numbers, lying as x does. ``is_kernels`` must hold.

    Args:
        x: [..., K], the matrix [R, K].
        element, scale, block, round_up: of a ``ScaledFormat``.
        drawn: for stochastic rounding, uniform in [0, 1), of x's shape; None: to nearest.
    """
    library = kernel()
    assert library is not None, "ask is_kernels first"
    down, across = block
    # A transposed matrix is rounded as it lies, in turned blocks.
    turned = x.dim() == 2 and not x.is_contiguous() and x.t().is_contiguous()
    if turned:
        down, across = across, down
    wide, chance = (
        None if one is None else (one.t() if turned else one).float().contiguous() for one in (x, drawn)
    )
    assert wide is not None
    out = torch.empty_like(wide)
    infinite = {"ieee": float("inf"), "nan": float("nan"), "none": element.largest}[element.specials]
    format = _Format(
        mantissa=element.mantissa_bits,
        bias=element.bias,
        largest_exponent=element.largest_exponent,
        scale=_SCALES[scale],
        round_up=round_up,
        largest=element.largest,
        infinite=infinite,
        nan=0.0 if element.specials == "none" else float("nan"),
    )
    library.stabilitylab_round(
        *(wide.numel() // wide.shape[-1], wide.shape[-1], down or 0, across or 0, wide.data_ptr()),
        *(None if chance is None else chance.data_ptr(), out.data_ptr(), ctypes.addressof(format)),
    )
    return out.t() if turned else out

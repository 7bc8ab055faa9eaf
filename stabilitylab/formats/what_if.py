"""What a format would do to a tensor, without using it.

    error       sqrt(sum (x^ - x)^2 / sum x^2)                          relative error of the whole
    underflow   share of the numbers that are not 0 and become 0
    overflow    share whose |x| / s is beyond the format's largest number: cut off, or not finite

TransformerEngine's debug features give the same three for its own layers on a GPU that has the format (nvdlfw-inspect); here they
apply to any tensor on any machine. Beside the formats of ``scaled_format`` there are symmetric integers, which are E1M6 and E1M2:
with one exponent bit a format's numbers are evenly spaced.

    int8-tensor, int8-row, int4-row, int4-tile32, ...    codes -127 to 127 or -7 to 7, fp32 scale A / 127 or A / 7

Limits: numbers that are not finite count as overflow, and the error leaves them out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.formats.block_scaled import (
    SCALED_FORMATS,
    BlockShape,
    ScaledFormat,
    _divided,
    _multiplied,
    _scales,
    scaled_format,
)
from stabilitylab.formats.number_format import NumberFormat, round_to

_INTEGERS = {
    bits: NumberFormat(
        name=f"int{bits}",
        exponent_bits=1,
        mantissa_bits=bits - 2,
        bias=1,
        largest=2 - 2.0 ** (2 - bits),
        specials="none",
    )
    for bits in (8, 4)
}
_INTEGER = re.compile(r"int(?P<bits>[48])-(?:(?P<share>tensor|row)|tile(?P<width>[1-9]\d*))")


@dataclass(frozen=True, kw_only=True)
class FormatError:
    """What a format does to a tensor; see the head of the module."""

    error: float
    underflow: float
    overflow: float


def what_if_format(name: str) -> ScaledFormat:
    """The format of that name, integers too. Raises InputError with the names there are."""
    if match := _INTEGER.fullmatch(name):
        block: BlockShape = (1, int(match["width"])) if match["width"] else (1, None)
        block = (None, None) if match["share"] == "tensor" else block
        return ScaledFormat(name=name, element=_INTEGERS[int(match["bits"])], block=block, scale="fp32")
    try:
        return scaled_format(name)
    except InputError:
        known = ", ".join(("int8-tensor", "int8-row", "int4-row", "int4-tile32", *SCALED_FORMATS))
        raise InputError(f"there is no format {name!r}: choose one of {known}") from None


def what_if(x: Tensor, format: ScaledFormat | str) -> FormatError:
    """Round x to a format, and see what it costs."""
    error, underflow, overflow = what_if_values(x, format).tolist()
    return FormatError(error=error, underflow=underflow, overflow=overflow)


@torch.no_grad()
def what_if_values(x: Tensor, format: ScaledFormat | str) -> Tensor:
    """[3] fp32 on x's device: error, underflow, overflow. Does not wait for the device."""
    kind = what_if_format(format) if isinstance(format, str) else format
    matrix = x.reshape(1, -1, x.shape[-1]) if x.dim() else x.reshape(1, 1, 1)
    total = max(1, x.numel())
    squares = torch.linalg.vector_norm(matrix.float().nan_to_num(0.0, 0.0, 0.0), dtype=torch.float64)
    difference, lost, beyond = what_if_sums(matrix, kind)[0]
    error = torch.where(squares > 0, difference.sqrt() / squares, 0.0)
    return torch.stack((error, lost / total, beyond / total)).float()


@torch.no_grad()
def what_if_sums(x_SRK: Tensor, kind: ScaledFormat, largest_S: Tensor | None = None) -> Tensor:
    """[S, 3] float64: of S tensors at once, the sum of (x^ - x)^2, how many underflow, how many overflow. Nothing is waited for.

    Args:
        x_SRK: rows of the tensors; S is 1 for a format whose blocks span several rows but not all.
        kind: the format.
        largest_S: the largest magnitude of each tensor, where its rows are only a sample; finite. None: the rows are all there is.
    """
    # A number that is not finite would take its block's scale with it; the question here is what becomes of the others.
    finite = x_SRK.float().nan_to_num(0.0, 0.0, 0.0)
    if largest_S is None:
        largest_S = finite.abs().amax((1, 2)) if finite.numel() else finite.new_zeros(len(finite))
    rows = finite.flatten(0, 1)
    whole = largest_S.float().repeat_interleave(finite.shape[1])[:, None]
    scales, tensor_scale = _scales(rows, kind, whole)
    each = replace(kind, block=(1, None)) if kind.block == (None, None) else kind
    divided = _divided(rows, each, scales, tensor_scale)
    nearest = round_to(divided, kind.element)
    rounded = _multiplied(nearest, each, scales, tensor_scale)
    lost = (rounded == 0) & (rows != 0)
    # A number on the rounding side of the largest one is not cut off.
    largest = kind.element.largest
    beyond = (nearest.abs() >= largest) & (divided.abs() > largest * (1 + 2.0**-22))
    beyond |= ~x_SRK.flatten(0, 1).isfinite()
    difference = torch.linalg.vector_norm(
        (rounded - rows).view_as(finite), dim=(1, 2), dtype=torch.float64
    ).square()
    counts = [flags.view_as(finite).sum((1, 2), dtype=torch.int64).double() for flags in (lost, beyond)]
    return torch.stack((difference, *counts), dim=1)


def gaussian_error(kind: ScaledFormat, width: int = 1024) -> float:
    """A format's error on independent normal numbers, a matrix of 64 rows: what is to be had without outliers."""
    # Quantiles in a fixed shuffle: no randomness, and the largest is where such a sample has it.
    count = 64 * width
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    normal = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)[order]
    x = normal.float().view(1, 64, width)
    return math.sqrt(float(what_if_sums(x, kind)[0, 0]) / float(x.double().square().sum()))

"""Formats with scales: a block of numbers shares one, so that a few bits span the range that the block has.

    s = scale of the block, a function of A = max |x| in it         code = round(x / s)         x^ = s * code

    name                                 element      a scale for            scale                     source
    e4m3, e5m2, fp16, bf16, ...          itself       nothing                none
    fp8-e4m3-tensor, fp8-e5m2-tensor     E4M3, E5M2   a tensor               fp32, A / largest         FP8, 2209.05433
    fp8-...-row                          the same     a row                  the same                  one a token, or a channel
    fp8-...-tile128                      the same     1 x 128 in a row       the same                  DeepSeek-V3, 2412.19437
    fp8-...-block128                     the same     128 x 128              the same                  the same, weights
    mxfp8-e4m3, mxfp8-e5m2               the same     1 x 32                 E8M0                      OCP Microscaling 1.0, 6.3
    mxfp6-e2m3, mxfp6-e3m2, mxfp4        E2M3 ...     1 x 32                 E8M0                      the same
    nvfp4, nvfp4-2d                      E2M1         1 x 16; 16 x 16        E4M3 x one fp32 a tensor  NVIDIA, 2509.25149, C

E8M0 is a power of two: 2^(floor(log2 A) - e), e the element's largest exponent, so that up to 1/4 of A is cut off for E4M3; the
names with ``-up`` take 2^ceil(log2(A / largest)) instead, which cuts nothing off (NVIDIA's, 2506.08027). NVFP4's tensor scale is t
= A_tensor / (448 * 6), its block scale A / 6 / t in E4M3, and x is multiplied by (1 / t) / block scale, as torchao does.

A block in which something is not finite is NaN altogether (MX, section 6.3: its scale is), so that an overflow cannot hide. A block
of zeros has scale 1 (E8M0: its smallest), and an NVFP4 block whose scale falls below E4M3's numbers is zero.

Shapes: a tensor [..., K] is the matrix [R, K]; blocks at the edge are cut short. Limits: scales and quotients are in fp32, where
the machines have them too; a quotient next to the middle of two numbers may fall to the other side in float64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.formats.kernel import is_kernels, rounded
from stabilitylab.formats.number_format import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    NUMBER_FORMATS,
    NumberFormat,
    Rounding,
    decode,
    encode,
    round_to,
)

# Rows and columns that share a scale; None: all of them.
BlockShape = tuple[int | None, int | None]


@dataclass(frozen=True, kw_only=True)
class ScaledFormat:
    """An element format and its scales.

    Attributes:
        name: what ``scaled_format`` reads.
        element: the format of the numbers.
        block: which numbers share a scale.
        scale: how it is stored; "none": there is none; "e4m3": two levels, with an fp32 scale of the whole tensor.
        round_up: whether an E8M0 scale is rounded up, so that nothing is cut off.
    """

    name: str
    element: NumberFormat
    block: BlockShape = (None, None)
    scale: Literal["none", "fp32", "e8m0", "e4m3"] = "none"
    round_up: bool = False

    @property
    def bits(self) -> float:
        """Bits of a number, its share of the block's scale included (of a scale a tensor or a row: 0)."""
        scale_bits = {"none": 0, "fp32": 32, "e8m0": 8, "e4m3": 8}[self.scale]
        rows, columns = self.block
        return self.element.bits + (scale_bits / (rows * columns) if rows and columns else 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """A tensor in a scaled format.

    Attributes:
        codes: bit patterns, uint8 (int32 above 8 bits), in the tensor's shape.
        scales: [row blocks, column blocks] in fp32, torch.float8_e8m0fnu or torch.float8_e4m3fn; None: the format has none.
        tensor_scale: NVFP4's fp32 scale of the whole.
        format: how to read them.
    """

    codes: Tensor
    scales: Tensor | None
    tensor_scale: Tensor | None
    format: ScaledFormat


def _fp8(element: NumberFormat) -> list[ScaledFormat]:
    blocks: dict[str, BlockShape] = {
        "tensor": (None, None),
        "row": (1, None),
        "tile128": (1, 128),
        "block128": (128, 128),
    }
    return [
        ScaledFormat(name=f"fp8-{element.name}-{share}", element=element, block=block, scale="fp32")
        for share, block in blocks.items()
    ]


def _mx(name: str, element: NumberFormat) -> list[ScaledFormat]:
    plain = ScaledFormat(name=name, element=element, block=(1, 32), scale="e8m0")
    return [plain, replace(plain, name=f"{name}-up", round_up=True)]


SCALED_FORMATS: Mapping[str, ScaledFormat] = {
    one.name: one
    for one in (
        *(ScaledFormat(name=name, element=element) for name, element in NUMBER_FORMATS.items()),
        *_fp8(E4M3),
        *_fp8(E5M2),
        *_mx("mxfp8-e4m3", E4M3),
        *_mx("mxfp8-e5m2", E5M2),
        *_mx("mxfp6-e2m3", E2M3),
        *_mx("mxfp6-e3m2", E3M2),
        *_mx("mxfp4", E2M1),
        ScaledFormat(name="nvfp4", element=E2M1, block=(1, 16), scale="e4m3"),
        ScaledFormat(name="nvfp4-2d", element=E2M1, block=(16, 16), scale="e4m3"),
    )
}
_SIZED = re.compile(r"(?P<stem>fp8-(?:e4m3|e5m2)-)(?:tile(?P<tile>\d+)|block(?P<block>\d+))")


def scaled_format(name: str) -> ScaledFormat:
    """The format of that name; tiles and blocks of FP8 may have any size. Raises InputError with the names there are."""
    if name in SCALED_FORMATS:
        return SCALED_FORMATS[name]
    if match := _SIZED.fullmatch(name):
        side = int(match["tile"] or match["block"])
        if side:
            block = (1, side) if match["tile"] else (side, side)
            return replace(SCALED_FORMATS[match["stem"] + "tensor"], name=name, block=block)
    raise InputError(f"there is no format {name!r}: choose one of {', '.join(SCALED_FORMATS)}")


def quantize(
    x: Tensor,
    format: ScaledFormat | str,
    *,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    like: Quantized | None = None,
) -> Quantized:
    """x in a scaled format.

    Args:
        x: [..., K], floating.
        format: the format, or its name.
        rounding, generator: of the elements (``round_to``); scales are always rounded to nearest.
        like: a tensor of the same shape and format whose scales replace x's own; what exceeds them is cut off.
    """
    kind = scaled_format(format) if isinstance(format, str) else format
    wide = x.float()
    scales, tensor_scale = _scales(wide, kind) if like is None else (like.scales, like.tensor_scale)
    divided = _divided(wide, kind, scales, tensor_scale)
    codes = encode(divided, kind.element, rounding=rounding, generator=generator)
    return Quantized(codes=codes, scales=scales, tensor_scale=tensor_scale, format=kind)


def dequantize(quantized: Quantized) -> Tensor:
    """What the codes stand for, in fp32."""
    values = decode(quantized.codes, quantized.format.element)
    return _multiplied(values, quantized.format, quantized.scales, quantized.tensor_scale)


def fake_quantize(
    x: Tensor,
    format: ScaledFormat | str,
    *,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """``dequantize(quantize(x))`` in fp32, bit for bit, without forming the codes. The compiled kernel does it if it takes x."""
    kind = scaled_format(format) if isinstance(format, str) else format
    if is_kernels(x, kind.element, kind.scale, kind.block):
        drawn = None
        if rounding == "stochastic":
            drawn = torch.rand(x.shape, generator=generator, device=x.device)
        return rounded(x, kind.element, kind.scale, kind.block, round_up=kind.round_up, drawn=drawn)
    wide = x.float()
    scales, tensor_scale = _scales(wide, kind)
    divided = _divided(wide, kind, scales, tensor_scale)
    values = round_to(divided, kind.element, rounding=rounding, generator=generator)
    return _multiplied(values, kind, scales, tensor_scale)


def _scales(
    x: Tensor, kind: ScaledFormat, whole: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Scales of every block, as they are stored, and of the tensor.

    Args:
        x: a tensor; or rows [R, K] of several.
        kind: the format.
        whole: [R, 1], for each row the largest magnitude of its tensor; None: x is all of one tensor.
    """
    if kind.scale == "none" or not x.numel():
        return None, None
    largest = block_maxima(x, kind.block) if whole is None or kind.block != (None, None) else whole
    return scales_of(largest, kind, whole)


def scales_of(
    largest: Tensor, kind: ScaledFormat, whole: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales of every block as they are stored, and of the tensor.

    Args:
        largest: the largest magnitude of each block, ``block_maxima``.
        kind: a format that has scales.
        whole: as in ``_scales``.
    """
    element = kind.element
    if kind.scale == "fp32":
        scale = largest / element.largest
        scale = torch.where(scale == 0, 1.0, scale)
        return torch.where(scale.isfinite(), scale, torch.nan), None
    if kind.scale == "e8m0":
        if kind.round_up:
            ratio = (largest / element.largest).view(torch.int32)
            # ceil(log2): one more than the exponent wherever the mantissa is not 0.
            field = (ratio >> 23) + ((ratio & 0x7FFFFF) > 0).int()
        else:
            field = (largest.view(torch.int32) >> 23) - element.largest_exponent
        field = torch.where(largest.isfinite(), field.clamp(0, 254), 255)
        return field.to(torch.uint8).view(torch.float8_e8m0fnu), None
    tensor_scale = (largest.amax() if whole is None else whole) / (E4M3.largest * element.largest)
    # Where the tensor's own scale falls out of fp32, nothing differs from zero.
    tensor_scale = torch.where(tensor_scale == 0, 1.0, tensor_scale)
    blocks = encode(largest / element.largest / tensor_scale, E4M3)
    return blocks.view(torch.float8_e4m3fn), tensor_scale


def _divided(x: Tensor, kind: ScaledFormat, scales: Tensor | None, tensor_scale: Tensor | None) -> Tensor:
    if scales is None:
        return x
    wide = scales.float()
    if tensor_scale is None:
        return _per_block(x, kind.block, wide, divide=True)
    inverse = torch.where(wide == 0, 0.0, (1.0 / tensor_scale) / wide)
    return _per_block(x, kind.block, inverse)


def _multiplied(
    values: Tensor, kind: ScaledFormat, scales: Tensor | None, tensor_scale: Tensor | None
) -> Tensor:
    if scales is None:
        return values
    wide = scales.float()
    return _per_block(values, kind.block, wide if tensor_scale is None else tensor_scale * wide)


def block_maxima(x: Tensor, block: BlockShape) -> Tensor:
    """max |x| of every block, [row blocks, column blocks]; NaN where something in it is."""
    matrix = _matrix(x)
    rows, columns = _size(block, matrix)
    if rows == matrix.shape[0] and columns == matrix.shape[1]:
        return torch.maximum(*(one.abs() for one in torch.aminmax(matrix))).view(1, 1)
    return _blocks(matrix.abs(), rows, columns).amax((1, 3))


def block_sums(x: Tensor, block: BlockShape) -> Tensor:
    """Sum of every block, [row blocks, column blocks]."""
    matrix = _matrix(x)
    rows, columns = _size(block, matrix)
    return _blocks(matrix, rows, columns).sum((1, 3))


def _per_block(x: Tensor, block: BlockShape, factors: Tensor, *, divide: bool = False) -> Tensor:
    """Every block of x times, or divided by, its factor."""
    matrix = _matrix(x)
    if factors.numel() == 1:
        result = matrix / factors if divide else matrix * factors
        return result.view(x.shape)
    rows, columns = _size(block, matrix)
    cut = _blocks(matrix, rows, columns)
    spread = factors[:, None, :, None]
    result = (cut / spread if divide else cut * spread).flatten(2).flatten(0, 1)
    return result[: matrix.shape[0], : matrix.shape[1]].reshape(x.shape)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)


def _size(block: BlockShape, matrix: Tensor) -> tuple[int, int]:
    rows, columns = block
    return rows or max(1, matrix.shape[0]), columns or max(1, matrix.shape[1])


def _blocks(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """[R, K] -> [row blocks, rows, column blocks, columns], filled up with zeros."""
    R, K = matrix.shape
    down, across = -R % rows, -K % columns
    if down or across:
        matrix = torch.nn.functional.pad(matrix, (0, across, 0, down))
    return matrix.reshape((R + down) // rows, rows, (K + across) // columns, columns)

"""Weight-only products on CPUs with torch's own int8 and int4 kernels for few rows, tiles of dequantized weights for many.

``_weight_int8pack_mm`` and ``_weight_int4pack_mm_for_cpu`` take bf16 activations, accumulate in fp32 and return bf16, whatever the
model computes in: about 0.002 of relative error beside 0.008 (int8) and 0.1 (int4) from the weights. From ``few_rows`` rows on the
weights are dequantized tile by tile instead, in the model's own precision.

Traps: the int8 kernel returns wrong numbers unless K is a multiple of 16, and the int4 kernel wants N a multiple of 16 and K of the
group; so columns and rows are padded here. Both get memory that lies as torch's own does: anything else is copied first. With fp32
activations both are slower than fp32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from stabilitylab.quantization.kernels.tiles import (
    bf16_is_fast,
    compute_dtype,
    padded,
    scratch,
    tile_rows,
    tiled_product,
)
from stabilitylab.quantization.scheme import Scheme
from stabilitylab.quantization.stored_weight import StoredWeight, pack_nibbles, quantize_weight


def few_rows(bits: int) -> int:
    """Up to how many rows the packed kernels beat dequantized tiles.

    Measured, on layers of 576 x 1536 to 2048 x 8192. Without native bf16 int8 is level from 16 to 24 rows and int4, whose tiles are
    dearer to make, from 120 to 140 on one and on two threads; with it both are at about 64.
    """
    if bf16_is_fast():
        return 64
    return 16 if bits == 8 else 128


def aligned(x: Tensor) -> Tensor:
    """x itself where it begins at a multiple of 64 bytes, as torch's own memory does; else a copy that does."""
    return x if x.data_ptr() % 64 == 0 else x.clone()


_LARGEST_BLOCK = 64  # rows of the int4 layout that lie together, at most
_CODES_AT_ONCE = 1 << 22


class PackedInt8:
    """int8 weights with a scale an output channel."""

    def __init__(self, stored: StoredWeight) -> None:
        self._columns = stored.shape[1]
        self._values = aligned(padded(stored.values, columns=32))
        self._scales = stored.scales.view(-1)

    def __call__(self, x_MK: Tensor) -> Tensor:
        if x_MK.shape[0] <= few_rows(8):
            x = aligned(padded(x_MK.to(torch.bfloat16), columns=32))
            y_MN: Tensor = torch.ops.aten._weight_int8pack_mm(x, self._values, self._scales)
            return y_MN
        x = padded(x_MK.to(compute_dtype(x_MK)), columns=32)
        return tiled_product(x, self._values).mul_(self._scales)

    def values(self) -> Tensor:
        return self._values[:, : self._columns].contiguous()


class PackedInt4:
    """int4 weights with a scale a row or a group, with or without zero points.

    The kernel's own layout is the only copy held: a block of B rows (32 with AVX2, 64 with AVX-512) lies as [K, B/2] bytes, the
    first half of the block's rows in the low nibbles, the second in the high ones.
    """

    def __init__(self, stored: StoredWeight) -> None:
        self._shape = rows, columns = stored.shape
        one_a_row = stored.scales.shape[1] == 1
        self._group = _row_group(columns) if one_a_row else stored.group
        self._packed = _packed(stored, self._group)
        width = -(-columns // self._group) * self._group
        scales = stored.scales.float()
        zeros = torch.full_like(scales, 8.0) if stored.zeros is None else stored.zeros.float()
        both = torch.stack([scales, (8.0 - zeros) * scales], -1).to(torch.bfloat16)
        both = both.expand(rows, width // self._group, 2)
        self._scales = F.pad(both, (0, 0, 0, 0, 0, -rows % 64), value=1.0).transpose(0, 1).contiguous()

    def __call__(self, x_MK: Tensor) -> Tensor:
        if x_MK.shape[0] <= few_rows(4):
            x = padded(x_MK.to(torch.bfloat16), columns=self._group)
            return _product(x, self._packed, self._group, self._scales)[:, : self._shape[0]]
        return self._in_tiles(padded(x_MK.to(compute_dtype(x_MK)), columns=self._group))

    def _in_tiles(self, x_MK: Tensor) -> Tensor:
        """Dequantize W' tile by tile, [K, n], and multiply."""
        columns = x_MK.shape[1]
        rows = self._scales.shape[1]
        half = _block() // 2
        y_MN = x_MK.new_empty(x_MK.shape[0], rows)
        tile = tile_rows(columns)
        for first in range(0, rows, tile):
            count = min(tile, rows - first)
            weights_Kn = scratch((columns, count), x_MK.dtype, x_MK.device)
            # b blocks of rows, G groups, g columns a group, h rows in half a block
            bytes_bGgh = self._packed.view(-1, columns // self._group, self._group, half)[
                first // (2 * half) : (first + count) // (2 * half)
            ]
            out_bGg2h = weights_Kn.view(-1, self._group, count // (2 * half), 2, half).permute(2, 0, 1, 3, 4)
            part = self._scales[:, first : first + count].to(x_MK.dtype)
            scale_Gb2h, shift_Gb2h = part.view(part.shape[0], -1, 2, half, 2).unbind(-1)
            # The shift was rounded to bf16; it is a whole multiple of the scale, below 16.
            shift_Gb2h = ((shift_Gb2h / scale_Gb2h).round() - 8) * scale_Gb2h
            for side, nibbles in enumerate((bytes_bGgh & 15, bytes_bGgh >> 4)):
                out = out_bGg2h[..., side, :]
                torch.mul(nibbles, scale_Gb2h[:, :, side].transpose(0, 1)[:, :, None], out=out)
                out.add_(shift_Gb2h[:, :, side].transpose(0, 1)[:, :, None])
            torch.mm(x_MK, weights_Kn, out=y_MN[:, first : first + count])
        return y_MN[:, : self._shape[0]]

    def values(self) -> Tensor:
        rows, columns = self._shape
        return pack_nibbles(_unpack(self._packed, self._scales.shape[1], _block())[:rows, :columns])


@cache
def packed_int8_agrees() -> bool:
    """Whether torch's int8 kernel exists here and agrees with the reference."""
    try:
        return all(_agrees(Scheme(bits=8), PackedInt8, shape) for shape in ((33, 100), (8, 64)))
    except (RuntimeError, AttributeError):
        return False


@cache
def packed_int4_agrees() -> bool:
    """Whether torch's int4 kernel exists here, has a layout that we know, and agrees with the reference."""
    try:
        schemes = [Scheme(bits=4), Scheme(bits=4, share=32, asymmetric=True)]
        return _block() > 0 and all(
            _agrees(scheme, PackedInt4, shape) for scheme in schemes for shape in ((70, 100), (64, 64))
        )
    except (RuntimeError, AttributeError):
        return False


def _agrees(scheme: Scheme, kernel: type[PackedInt8] | type[PackedInt4], shape: tuple[int, int]) -> bool:
    """Codes there and back, and products with few and many rows within bf16's rounding."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    stored = quantize_weight(weight, scheme)
    made = kernel(stored)
    if not torch.equal(made.values(), stored.values):
        return False
    for rows in (1, few_rows(scheme.bits) + 1):
        x = torch.randn(rows, shape[1], generator=generator).to(torch.bfloat16)
        # Each term has a rounding of at most 2^-8: of the zero points' term in int4, and of the result.
        magnitude = x.abs().double() @ (
            stored.dequantize(torch.float64).abs().T + 8 * stored.scales.double().amax()
        )
        error = (made(x).double() - x.double() @ stored.dequantize(torch.float64).T).abs()
        if not bool((error <= 2**-8 * magnitude).all()):
            return False
    return True


@cache
def _block() -> int:
    """Rows in a block of the int4 layout on this machine; 0 if we do not know the layout."""
    codes = torch.randint(0, 16, (128, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = _pack(codes)
    return next((block for block in (32, 64) if torch.equal(_unpack(packed, 128, block), codes)), 0)


def _packed(stored: StoredWeight, group: int) -> Tensor:
    """Weights in the kernel's layout, columns and rows padded. Some rows at a time: the operator takes four bytes a code, and a
    vocabulary's matrix has a hundred million codes."""
    count, columns = stored.shape
    width = -(-columns // group) * group
    packed = torch.empty(count + -count % _LARGEST_BLOCK, width // 2, dtype=torch.uint8)
    rows = max(_LARGEST_BLOCK, _CODES_AT_ONCE // max(1, width) // _LARGEST_BLOCK * _LARGEST_BLOCK)
    for start in range(0, count, rows):
        codes = padded(stored.codes(slice(start, start + rows)), columns=group, rows=_LARGEST_BLOCK)
        packed[start : start + len(codes)] = _pack(codes)
    return packed


def _pack(codes: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return found


def _unpack(packed: Tensor, rows: int, block: int) -> Tensor:
    """Codes [N, K] from the kernel's layout."""
    blocks = packed.reshape(rows // block, -1, block // 2)
    return (
        torch.stack([blocks & 15, blocks >> 4], 2)
        .view(*blocks.shape[:2], block)
        .transpose(1, 2)
        .reshape(rows, -1)
    )


def _product(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)
    return y


def _row_group(columns: int) -> int:
    """The group that pads a row least, larger ones first."""
    return min((128, 64, 32), key=lambda group: -columns % group)

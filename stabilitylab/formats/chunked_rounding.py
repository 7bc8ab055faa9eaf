"""Rounds a large matrix to a scaled format some rows at a time: rounding N numbers at once takes some thirty bytes for each.

Numbers are those of ``quantize`` and ``quantize_searched`` to the bit: blocks do not depend on each other, and what belongs to the
whole tensor (its largest number, NVFP4's first scale) is taken over all parts first. A search for one scale of a whole tensor looks
at all of it together and is not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from stabilitylab.formats.block_scaled import (
    Quantized,
    ScaledFormat,
    block_maxima,
    quantize,
    scaled_format,
    scales_of,
)
from stabilitylab.formats.scale_search import quantize_searched

_WHOLE = 1 << 25  # matrices of up to this many numbers are rounded whole; larger ones
_AT_ONCE = 1 << 20  # in parts of this many numbers


def row_parts(rows: int, columns: int, format: ScaledFormat) -> Iterator[slice]:
    """Rows of a matrix to look at together, no block of scales in two parts; all rows of a small matrix."""
    height = format.block[0] or 1
    many = rows
    if rows * columns > _WHOLE:
        many = max(1, _AT_ONCE // max(1, columns * height)) * height
    for start in range(0, rows, max(1, many)):
        yield slice(start, min(start + many, rows))


def quantize_rows(
    x: Tensor,
    format: ScaledFormat | str,
    *,
    search: bool = False,
    seen: Callable[[Tensor], None] | None = None,
) -> Quantized:
    """``quantize(x)``, or with ``search`` ``quantize_searched(x)``.

    Args:
        x: [R, K].
        format: the format, or its name.
        search: whether to search scales.
        seen: called with each part that has been read.
    """
    kind = scaled_format(format) if isinstance(format, str) else format
    together = search and kind.block[0] is None and kind.scale != "none"
    if x.numel() <= _WHOLE or together:
        return (quantize_searched if search else quantize)(x, kind)
    done = seen or (lambda part: None)
    parts = list(row_parts(x.shape[0], x.shape[1], kind))
    usual = Quantized(codes=x.new_empty(0), scales=None, tensor_scale=None, format=kind)
    if kind.scale != "none":
        maxima = []
        for rows in parts:
            maxima.append(block_maxima(x[rows].float(), kind.block))
            done(x[rows])
        largest = torch.cat(maxima)
        if kind.block[0] is None:
            largest = largest.amax(0, keepdim=True)
        scales, tensor_scale = scales_of(largest, kind)
        usual = replace(usual, scales=scales, tensor_scale=tensor_scale)
    codes: Tensor | None = None
    searched = []
    for rows in parts:
        like = some_rows(usual, rows)
        made = quantize_searched(x[rows], kind, like=like) if search else quantize(x[rows], kind, like=like)
        if codes is None:
            codes = made.codes.new_empty(x.shape)
        codes[rows] = made.codes
        searched.append(made.scales)
        done(x[rows])
    assert codes is not None
    if search and usual.scales is not None:
        usual = replace(usual, scales=_joined([one for one in searched if one is not None]))
    return replace(usual, codes=codes)


def some_rows(made: Quantized, rows: slice | Tensor) -> Quantized:
    """Rows of a quantized matrix.

    Args:
        made: [R, K]; codes may be missing.
        rows: from the first of a block of scales on, or whole numbers.
    """
    codes = made.codes[rows] if made.codes.numel() else made.codes
    height = made.format.block[0]
    if made.scales is None or made.scales.numel() == 1 or height is None:
        return replace(made, codes=codes)
    # Not every format of a byte can be indexed.
    scales = made.scales.view(torch.uint8) if made.scales.itemsize == 1 else made.scales
    if isinstance(rows, slice):
        scales = scales[rows.start // height : -(-rows.stop // height)]
        return replace(made, codes=codes, scales=scales.view(made.scales.dtype))
    form = replace(made.format, block=(1, made.format.block[1]))
    return replace(made, codes=codes, scales=scales[rows // height].view(made.scales.dtype), format=form)


def _joined(scales: list[Tensor]) -> Tensor:
    # Nor can every format be joined.
    kind = scales[0].dtype
    return torch.cat([one.view(torch.uint8) if one.itemsize == 1 else one for one in scales]).view(kind)

"""Dequantizes a tile of rows into a scratch buffer that stays in cache and multiplies it, tile by tile: correct for any scheme,
shape and device.

The weights leave memory as bytes, not as floats, so from a few dozen rows on this costs little more than the product in floats.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from stabilitylab.quantization.stored_weight import StoredWeight

_TILE_ELEMENTS = 1 << 20  # 4 MB of float32
# An accelerator has no such cache, and each operation costs it more than a tile of that size: 128 MB of bf16.
_ACCELERATOR_TILE_ELEMENTS = 1 << 26
_scratch = threading.local()


def bf16_is_fast() -> bool:
    """Whether this processor multiplies bf16 natively. (Without, bf16 products are several times slower than fp32.)"""
    return any(
        getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The format in which products with dequantized weights are quick and exact enough on x's device."""
    if x.is_cuda:
        return x.dtype
    return x.dtype if x.dtype == torch.bfloat16 and bf16_is_fast() else torch.float32


def tile_rows(columns: int, device: str = "cpu") -> int:
    """Output channels in a tile; a multiple of 64."""
    elements = _TILE_ELEMENTS if device == "cpu" else _ACCELERATOR_TILE_ELEMENTS
    return max(64, elements // max(columns, 1) // 64 * 64)


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory, this thread's own, valid until the next call."""
    size = 1
    for length in shape:
        size *= length
    key = f"{dtype} {device}"
    held: Tensor | None = getattr(_scratch, key, None)
    if held is None or held.numel() < size:
        # Made outside inference mode, or later calls outside of it might not write here.
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=dtype, device=device)
        setattr(_scratch, key, held)
    return held[:size].view(shape)


def padded(x: Tensor, *, columns: int, rows: int = 1) -> Tensor:
    """x [M, K] with zeros up to multiples of ``rows`` and ``columns``: contiguous, and x itself where nothing is missing."""
    missing = -x.shape[1] % columns, -x.shape[0] % rows
    return torch.nn.functional.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x.contiguous()


class TiledWeight:
    """Weight-only schemes: y = x dequantize(W)'."""

    def __init__(self, stored: StoredWeight) -> None:
        self._stored = stored

    def __call__(self, x_MK: Tensor) -> Tensor:
        rows, columns = self._stored.shape
        x_MK = x_MK.to(compute_dtype(x_MK))
        y_MN = x_MK.new_empty(x_MK.shape[0], rows)
        tile = tile_rows(columns, x_MK.device.type)
        for first in range(0, rows, tile):
            part = slice(first, first + tile)
            y_MN[:, part] = x_MK @ self._stored.dequantize(x_MK.dtype, part).T
        return y_MN

    def values(self) -> Tensor:
        return self._stored.values


class TiledInt8:
    """Integer products in float32: exact below 2^24, which K = 1,040 columns of 127 x 127 reach; beyond, rounded as float32 is."""

    def __init__(self, stored: StoredWeight) -> None:
        self._values = stored.values
        self._scales = stored.scales.view(-1)

    def __call__(self, codes_MK: Tensor, signed: int) -> Tensor:
        return tiled_product(codes_MK, self._values).mul_(self._scales)

    def values(self) -> Tensor:
        return self._values


def tiled_product(x_MK: Tensor, values_NK: Tensor) -> Tensor:
    """x W' for int8 W and floating x, in x's format."""
    rows, columns = values_NK.shape
    y_MN = x_MK.new_empty(x_MK.shape[0], rows)
    tile = tile_rows(columns)
    for first in range(0, rows, tile):
        part = values_NK[first : first + tile]
        weights = scratch((part.shape[0], columns), x_MK.dtype, x_MK.device)
        weights.copy_(part)
        torch.mm(x_MK, weights.T, out=y_MN[:, first : first + tile])
    return y_MN

"""Searches a format's scales for the least squared error, instead of taking them from the largest number.

    for each block   s = argmin over candidates c of  sum (x - c round(x / c))^2

Candidates of E4M3 and fp32 scales are the usual scale times 1, .95, ..., .55, and times 1.5. The smaller ones cut off the block's
largest numbers and round the others more finely (clipping by squared error, OMSE, arXiv:1902.06822). The larger one suits E2M1,
which has the numbers 4 and 6 and nothing between, so a block's largest may better become 4 (arXiv:2512.02010). E8M0 scales are
powers of two: their candidates are the usual scale, half of it and twice it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stabilitylab.formats.block_scaled import (
    Quantized,
    ScaledFormat,
    block_sums,
    dequantize,
    quantize,
    scaled_format,
)

_FACTORS = (1.5, *(1.0 - 0.05 * step for step in range(1, 10)))


def quantize_searched(x: Tensor, format: ScaledFormat | str, *, like: Quantized | None = None) -> Quantized:
    """x [..., K] in a scaled format with searched scales. Formats without scales have nothing to search: they only round.

    Args:
        x: floating.
        format: the format, or its name.
        like: has the usual scales, from which the search starts; None: x's own.
    """
    kind = scaled_format(format) if isinstance(format, str) else format
    best = quantize(x, kind, like=like)
    if best.scales is None:
        return best
    usual, chosen = best.scales, best.scales.float()
    least = _errors(x, best)
    highest = 2.0**127 if kind.scale == "e8m0" else 448.0 if kind.scale == "e4m3" else float("inf")
    for factor in (0.5, 2.0) if kind.scale == "e8m0" else _FACTORS:
        # Clamped first: torch's casts make NaN of what is beyond the largest.
        scales = (usual.float() * factor).clamp(max=highest).to(usual.dtype)
        error = _errors(x, quantize(x, kind, like=replace(best, scales=scales)))
        better = error < least  # false where something is not finite: the usual scale, which says so, stays
        chosen = torch.where(better, scales.float(), chosen)
        least = torch.where(better, error, least)
    return quantize(x, kind, like=replace(best, scales=chosen.to(usual.dtype)))


def _errors(x: Tensor, made: Quantized) -> Tensor:
    """Squared error of every block, [row blocks, column blocks]."""
    return block_sums((dequantize(made) - x.float()).square(), made.format.block)

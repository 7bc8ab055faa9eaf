"""What a format would do to a tensor, without using it.

    error       sqrt(sum (x^ - x)^2 / sum x^2)                          relative error of the whole
    underflow   share of the numbers that are not 0 and become 0
    overflow    share whose |x| / s is beyond the format's largest number: cut off, or not finite

TransformerEngine's debug features give the same three for its own layers on a GPU that has the format (nvdlfw-inspect); here they
are of any tensor on any machine. Limits: numbers that are not finite count as overflow and are left out of the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.formats.number_format import round_to
from stabilitylab.formats.scaled import ScaledFormat, _divided, _multiplied, _scales, scaled_format


@dataclass(frozen=True, kw_only=True)
class FormatError:
    """What a format does to a tensor; see the head of the module."""

    error: float
    underflow: float
    overflow: float


def what_if(x: Tensor, format: ScaledFormat | str) -> FormatError:
    """Round x to a format, and see what it costs."""
    error, underflow, overflow = what_if_values(x, format).tolist()
    return FormatError(error=error, underflow=underflow, overflow=overflow)


@torch.no_grad()
def what_if_values(x: Tensor, format: ScaledFormat | str) -> Tensor:
    """[3] fp32 on x's device: error, underflow, overflow. Nothing is waited for."""
    kind = scaled_format(format) if isinstance(format, str) else format
    # What is not finite would take its block's scale with it: the question here is what becomes of the others.
    finite = x.float().nan_to_num(0.0, 0.0, 0.0)
    broken = (~x.isfinite()).sum()
    scales, tensor_scale = _scales(finite, kind)
    divided = _divided(finite, kind, scales, tensor_scale)
    rounded = _multiplied(round_to(divided, kind.element), kind, scales, tensor_scale)
    total = max(1, x.numel())
    lost = ((rounded == 0) & (finite != 0)).sum() / total
    # A number on the rounding side of the largest one is not cut off.
    cut = (round_to(divided, kind.element).abs() >= kind.element.largest) & (
        divided.abs() > kind.element.largest * (1 + 2.0**-22)
    )
    squares = torch.linalg.vector_norm(finite, dtype=torch.float64)
    difference = torch.linalg.vector_norm(rounded - finite, dtype=torch.float64)
    error = torch.where(squares > 0, difference / squares, 0.0)
    return torch.stack((error.float(), lost.float(), ((cut.sum() + broken) / total).float()))

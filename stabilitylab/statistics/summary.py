"""What is known of one tensor after one pass: counts, power sums, the largest and the smallest value.

All of it merges exactly over parts of a tensor, micro-batches and ranks: counts and power sums add, extremes
take the maximum. So this is what leaves the device, as one row of float64 per tensor (``FIELDS``), and every
statistic that people read is computed from it on the host (``moments``, ``formats``).

    count        elements                           s1 .. s4   sum of x^k, k = 1..4
    nonfinite    NaN or infinite                    maximum    largest x       (NaN if any is NaN)
    zero         equal to 0                         negative   largest -x      (NaN if any is NaN)
    subnormal    0 < |x| < the smallest normal number of the tensor's own format
    fp16_lost    nonzero, but rounds to 0 in fp16: |x| <= 2^-25
    fp8_lost     nonzero, but rounds to 0 in FP8 E4M3: |x| <= 2^-10
    over_6       |x| >= 6, the magnitude criterion of LLM.int8() (Dettmers et al., arXiv:2208.07339, section
    3.1)

Power sums are taken of x divided by the tensor's largest magnitude and scaled back in float64, so that x^4
neither overflows nor underflows in float32 for any x that float32 holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUMS = (
    "count",
    "nonfinite",
    "zero",
    "subnormal",
    "fp16_lost",
    "fp8_lost",
    "over_6",
    "s1",
    "s2",
    "s3",
    "s4",
)
MAXIMA = ("maximum", "negative")
FIELDS = SUMS + MAXIMA
COLUMN = {name: i for i, name in enumerate(FIELDS)}


def measurable(x: object) -> bool:
    """Whether ``x`` is a tensor that holds real or complex floating-point numbers in memory, at least one."""
    return (
        isinstance(x, Tensor)
        and (x.is_floating_point() or x.is_complex())
        and x.device.type != "meta"
        and x.numel() > 0
    )


def dense(x: Tensor) -> tuple[Tensor, int]:
    """The stored real numbers of ``x`` and how many further elements are zero because they are not stored.

    A complex tensor counts as its real and imaginary parts, a sparse one as its values and the implied zeros.
    """
    x = x.detach()
    implied = 0
    if x.layout is not torch.strided:
        size = x.numel()
        x = (x.coalesce() if x.layout is torch.sparse_coo else x).values()
        implied = size - x.numel()
    if x.is_complex():
        x, implied = torch.view_as_real(x.resolve_conj()), 2 * implied
    return x, implied


def summarise(x: Tensor) -> Tensor:
    """One row of ``FIELDS`` in float64 on the tensor's device, without a host synchronisation.

    Args:
        x: any measurable tensor, of any shape.
    """
    x, implied = dense(x)
    subnormal = torch.finfo(x.dtype).smallest_normal
    x = x if x.dtype == torch.float64 else x.float()
    if x.numel() == 0:
        x = x.new_zeros(1)
        implied -= 1
    low, high = torch.aminmax(x)
    scale = torch.maximum(high, -low)
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    size = x.abs()
    y = x / scale
    y2 = y * y
    power = scale.double()
    row = torch.stack(
        [
            torch.isfinite(x).logical_not_().sum().double(),
            (x == 0).sum().double() + implied,
            (size < subnormal).sum().double(),
            (size <= 2.0**-25).sum().double(),
            (size <= 2.0**-10).sum().double(),
            (size >= 6.0).sum().double(),
            y.sum(dtype=torch.float64) * power,
            y2.sum(dtype=torch.float64) * power**2,
            (y * y2).sum(dtype=torch.float64) * power**3,
            y2.square_().sum(dtype=torch.float64) * power**4,
            high.double(),
            -low.double(),
        ]
    )
    row[2:5] -= row[1] - implied
    count = torch.full((1,), float(x.numel() + implied), dtype=torch.float64, device=x.device)
    return torch.cat([count, row])


def merge(row: Tensor, other: Tensor) -> None:
    """Add what ``other`` saw to ``row`` in place, for any number of rows (..., FIELDS)."""
    n = len(SUMS)
    row[..., :n] += other[..., :n]
    torch.maximum(row[..., n:], other[..., n:], out=row[..., n:])

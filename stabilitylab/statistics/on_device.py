"""The summary of a tensor on its accelerator: few operations, without waiting for any.

A device finishes a layer's activations in some microseconds, and each operation costs the host as much. So one operation counts
against all limits, and power sums are float64 dot products of x and x^2, which need no centre and no scale to keep their digits:
rows hold them as float64 in any case.

    counts = sum [|x| <= limit], of all limits          s2 = x . x      s3 = x . x^2      s4 = x^2 . x^2

Constants go to each device once (which waits for it). A tensor is processed in parts of ``PART`` elements, so that the summary
holds at most 30 bytes times that beside it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitylab.statistics.tails import TAIL_BINS, TAIL_FIRST, TAIL_SHIFT

PART = 1 << 25
SAMPLE = 2048
# Most elements of a tensor that is processed together with others, and of all together.
SMALL, TOGETHER = 1 << 20, 1 << 22
# Coefficients of the counts of |x| up to infinity, the largest number, 0, below the smallest normal, 2^-25, 2^-10 and below 6, in
# count, nonfinite, zero, subnormal, fp16_lost, fp8_lost and over_6; and those of the number of elements.
_OF_COUNTS = (
    (0, 0, 0, 0, 0, 0, 0),
    (0, -1, 0, 0, 0, 0, 0),
    (0, 0, 1, 0, 0, 0, 0),
    (0, 0, -1, 1, 0, 0, 0),
    (0, 0, -1, 0, 1, 0, 0),
    (0, 0, -1, 0, 0, 1, 0),
    (1, 0, 0, 0, 0, 0, -1),
)
_OF_ELEMENTS = (1, 1, 0, 0, 0, 0, 0)
_OF_IMPLIED = (1, 0, 1, 0, 0, 0, 0)


@functools.cache
def _constants(device: torch.device, own: torch.dtype) -> tuple[Tensor, ...]:
    """Limits [7, 1]; in float64 the three tables above and two zeros; an int32 one; the limits ascending [7], and each one's place
    among them."""
    wide, kind = (torch.float64, np.float64) if own == torch.float64 else (torch.float32, np.float32)
    zero = kind(0)
    smallest = np.nextafter(kind(torch.finfo(own).smallest_normal), zero)
    limits = [math.inf, torch.finfo(wide).max, 0.0, smallest, 2.0**-25, 2.0**-10, np.nextafter(kind(6), zero)]
    tables = [torch.tensor(one, dtype=torch.float64) for one in (_OF_COUNTS, _OF_ELEMENTS, _OF_IMPLIED)]
    made = [torch.tensor([float(x) for x in limits], dtype=wide)[:, None], *tables, torch.zeros(2).double()]
    ascending, order = made[0][:, 0].sort()
    ones = torch.ones(1, dtype=torch.int32)
    return tuple(one.to(device) for one in (*made, ones, ascending, order.argsort()))


def summarise(
    x: Tensor, implied: int = 0, *, full: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Like ``summary.summarise``; ``x`` has at least one element."""
    _, of_counts, of_elements, of_implied, none, one, ascending, place = _constants(x.device, x.dtype)
    flat = x.reshape(-1)
    size = flat.abs()
    sizes = torch.split(size, PART)
    parts = [_powers(part) for part in torch.split(flat, PART)]
    counts = _added([at_most(part, ascending, one) for part in sizes])[place]
    powers = [_added(list(several)) for several in zip(*parts, strict=True)]
    high = size.amax()
    fields = torch.addmv(of_elements, of_counts, counts.double(), beta=flat.numel())
    if implied:
        fields = fields + implied * of_implied
    rest = none
    if full:
        rest = _over(size, sizes, (powers[1] / (flat.numel() + implied)).sqrt())
    # Joining them makes all float64.
    row = torch.cat([fields, rest, *(part.reshape(1) for part in (*powers, high)), none[:1]])
    if not full:
        return row, None, None, None
    size_RC = size.float().reshape(-1, x.shape[-1] if x.dim() else 1)
    bits_RC = size_RC.view(torch.int32)
    tail = torch.zeros(TAIL_BINS, dtype=torch.int32, device=x.device)
    for bits in torch.split(bits_RC.reshape(-1), PART):
        tail += _counted((bits >> TAIL_SHIFT).sub_(TAIL_FIRST).clamp_(0, TAIL_BINS - 1), TAIL_BINS, one)
    # NaN has the largest bits, but is no magnitude.
    tail[-1:].add_(counts[:1] - flat.numel())
    squares = torch.linalg.vector_norm(size_RC, dim=0).square()
    return row, bits_RC.amax(0), squares, tail


def _powers(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of x, x^2, x^3, x^4, in float64."""
    wide = x.double()
    square = wide * wide
    return wide.sum(), torch.dot(wide, wide), torch.dot(wide, square), torch.dot(square, square)


def at_most(x: Tensor, ascending: Tensor, one: Tensor) -> Tensor:
    """[limits] numbers of elements not above each of these ascending limits, NaN above all: one pass, not seven."""
    over = torch.bucketize(x.to(ascending.dtype), ascending, out_int32=True)
    return _counted(over, len(ascending) + 1, one)[:-1].cumsum(0)


def _counted(bins: Tensor, number: int, one: Tensor) -> Tensor:
    """[number] counts of each int32 bin; ``one`` is an int32 one on the device.

    Most magnitudes share a few bins, and additions to one address of a GPU's memory wait for each other. ``histc`` on a GPU counts
    in each block's own memory first; bin v of [0, number) is exactly v. Elsewhere it takes no integers.
    """
    if bins.is_cuda:
        return torch.histc(bins, number, 0, number)
    return bins.new_zeros(number).scatter_add_(0, bins.long(), one.expand(len(bins)))


@functools.lru_cache(maxsize=64)
def _places(elements: int, device: torch.device) -> Tensor:
    """The places of a sample at even distances."""
    return torch.arange(SAMPLE, device=device).mul_(elements).div_(SAMPLE, rounding_mode="floor")


def _added(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _over(size: Tensor, sizes: tuple[Tensor, ...], rms: Tensor) -> Tensor:
    """[2] numbers of elements of at least 6 RMS, and of massive ones."""
    sample = size if size.numel() <= SAMPLE else size[_places(size.numel(), size.device)]
    # Among zeros alone none reaches 6 RMS.
    limits = [(6 * rms).clamp_min(1e-300)]
    limits.append((1000 * sample.double().median()).clamp_min(float(np.nextafter(np.float32(100), np.inf))))
    limits_L1 = torch.stack(limits)[:, None]
    return _added([(part >= limits_L1).sum(1) for part in sizes])


def summarise_alike(tensors: Sequence[Tensor]) -> Tensor:
    """Rows [tensors, FIELDS] of dense tensors of one format and number of elements, without channels and tail.

    A hundred of a few thousand elements each (biases, gains of norms) cost as much as one.
    """
    x_SN = torch.stack([x.reshape(-1) for x in tensors])
    limits, of_counts, of_elements, _, none, *_ = _constants(x_SN.device, x_SN.dtype)
    size_SN = x_SN.abs()
    counts_7S = (size_SN <= limits[:, :, None]).sum(2).double()
    wide_SN = x_SN.double()
    square_SN = wide_SN * wide_SN
    sums = [one.sum(1) for one in (wide_SN, square_SN, square_SN * wide_SN, square_SN * square_SN)]
    fields_S7 = torch.addmm(of_elements, counts_7S.T, of_counts.T, beta=x_SN.shape[1])
    ends_S5 = torch.stack([*sums, size_SN.amax(1).double()], dim=1)
    several = none.expand(len(tensors), -1)
    return torch.cat([fields_S7, several, ends_S5, several[:, :1]], dim=1)


def alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Groups of places of tensors to process together: small ones on an accelerator."""
    groups: dict[Any, list[int]] = {}
    for place, x in enumerate(tensors):
        if is_small(x) and x.layout is torch.strided and x.is_floating_point():
            groups.setdefault((x.device, x.dtype, x.numel()), []).append(place)
    most = [max(1, TOGETHER // max(1, key[2])) for key in groups]
    return [
        places[first : first + count]
        for places, count in zip(groups.values(), most, strict=True)
        for first in range(0, len(places), count)
    ]


def is_small(x: Tensor) -> bool:
    """Whether launching operations on it costs more than their work."""
    return x.device.type != "cpu" and 0 < x.numel() <= SMALL

"""How a half-precision gradient uses its format: how much overflowed, vanished or lost bits.

Per tensor, over the *scaled* gradient as backward left it:

    nonfinite   |g| = inf or NaN: above the largest number (65,504 in fp16)
    zero        g = 0: below half the smallest subnormal, or truly zero
    subnormal   0 < |g| < smallest normal (2^-14 in fp16, 2^-126 in bf16): represented, with fewer significant bits

Source: the histogram argument of Micikevicius et al. (1710.03740, figure 3), as counts. Limits: an exact zero and an underflow look
alike; embedding rows of tokens that did not occur are exact zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Up to this many elements, tensors are counted together.
SMALL = 1 << 16


@dataclass(frozen=True, kw_only=True)
class GradientRange:
    """Counts of gradient elements by where they lie in their format."""

    elements: int
    nonfinite: int
    zero: int
    subnormal: int


def gradient_range(gradients: Iterable[Tensor]) -> GradientRange:
    """Count the elements of all tensors together; one transfer to the host."""
    elements, counts = count_all(gradients)
    if counts is None:
        return GradientRange(elements=0, nonfinite=0, zero=0, subnormal=0)
    nonfinite, zero, subnormal = (int(count) for count in counts.tolist())
    return GradientRange(elements=elements, nonfinite=nonfinite, zero=zero, subnormal=subnormal)


def count_all(gradients: Iterable[Tensor]) -> tuple[int, Tensor | None]:
    """Elements of all tensors together, and their counts [3] as of ``count_elements``, on the device; None where there is none."""
    together: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    elements, counts = 0, []
    for gradient in gradients:
        elements += gradient.numel()
        if gradient.numel() > SMALL or gradient.layout is not torch.strided:
            counts.append(count_elements(gradient))
        else:  # a call costs more than their elements do
            together.setdefault((gradient.dtype, gradient.device), []).append(gradient.detach().flatten())
    counts += [count_elements(torch.cat(parts)) for parts in together.values()]
    return elements, torch.stack(counts).sum(0) if counts else None


def count_elements(gradient: Tensor) -> Tensor:
    """[3] int64 on the gradient's device: non-finite, zero and subnormal elements of one tensor."""
    magnitude = gradient.detach().abs()
    zero = (magnitude == 0).sum()
    below_normal = (magnitude < torch.finfo(gradient.dtype).tiny).sum()
    return torch.stack(((~torch.isfinite(magnitude)).sum(), zero, below_normal - zero))

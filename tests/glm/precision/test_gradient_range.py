"""Counts of gradient elements against a look at each element's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glm.precision import GradientRange, gradient_range


def by_bits(tensor: torch.Tensor, exponent_bits: int, mantissa_bits: int) -> tuple[int, int, int]:
    """Non-finite, zero, subnormal, read from sign, exponent and mantissa (IEEE 754)."""
    bits = tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32).numpy().astype(np.int64)
    exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = bits & ((1 << mantissa_bits) - 1)
    nonfinite = exponent == (1 << exponent_bits) - 1
    return (
        int(nonfinite.sum()),
        int(((exponent == 0) & (mantissa == 0)).sum()),
        int(((exponent == 0) & (mantissa != 0)).sum()),
    )


@pytest.mark.parametrize(("dtype", "layout"), [(torch.float16, (5, 10)), (torch.bfloat16, (8, 7))])
def test_every_half_number_is_counted_where_it_lies(dtype, layout):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    nonfinite, zero, subnormal = by_bits(every, *layout)
    assert zero == 2  # +0 and -0
    found = gradient_range([every[:1000], every[1000:].reshape(-1, 8)])
    assert found == GradientRange(elements=1 << 16, nonfinite=nonfinite, zero=zero, subnormal=subnormal)


def test_single_precision():
    values = torch.tensor([0.0, 1e-40, 1e-38, 1.0, torch.inf, -torch.inf, torch.nan])
    nonfinite, zero, subnormal = by_bits(values, 8, 23)
    assert (nonfinite, zero, subnormal) == (3, 1, 2)
    assert gradient_range([values]) == GradientRange(elements=7, nonfinite=3, zero=1, subnormal=2)


def test_no_gradients_are_no_elements():
    assert gradient_range([]) == GradientRange(elements=0, nonfinite=0, zero=0, subnormal=0)

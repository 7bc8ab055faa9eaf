"""The sample of a parameter: what it looks at."""

from __future__ import annotations

import math

import pytest
import torch

from stabilitylab.statistics.updates import ONE_IN, SAMPLE, Update


@pytest.mark.parametrize(
    "shape", [(2048, 512), (8192, 512), (4096, 1024), (3072, 768), (4096, 4096), (50257, 64)]
)
def test_a_sample_goes_through_all_columns(shape: tuple[int, int]) -> None:
    """As often through each as through any other, to one; a matrix's width and the distance share no factor."""
    n = shape[0] * shape[1]
    update = Update(torch.empty(shape, device="meta"))
    visits = torch.bincount(torch.arange(0, n, update.stride) % shape[1], minlength=shape[1])
    assert int(visits.max()) <= math.ceil(update.sampled / shape[1]) + 1
    assert int(visits.min()) >= update.sampled // shape[1] - 1
    assert update.sampled >= max(SAMPLE, n // ONE_IN)


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 510, 512, 1000, 30030, 65536])
def test_a_sample_is_never_much_larger_than_asked_for(n: int) -> None:
    update = Update(torch.empty(n, device="meta"))
    assert math.gcd(update.stride, n) == 1
    assert min(n, SAMPLE) <= update.sampled <= 8 * max(SAMPLE, n // ONE_IN)

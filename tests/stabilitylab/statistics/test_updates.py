"""The sample of a parameter: which elements it takes."""

from __future__ import annotations

import math

import pytest
import torch

from stabilitylab.statistics import updates as updates_module
from stabilitylab.statistics.updates import ONE_IN, SAMPLE, AdamMoments, Update, after_all, take_before


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_ones_together_are_each_by_itself(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator; with and without moments, their correction a number or on the device, a v that is none."""
    monkeypatch.setattr(updates_module, "is_small", lambda x: x.numel() <= 4096)
    g = torch.Generator().manual_seed(0)
    stepped = []
    for i, n in enumerate((1, 7, 64, 300, 300, 3000, 9000, 64, 64)):
        update = Update(torch.randn(n, generator=g).to(dtype))
        first, second, gradient = (torch.randn(n, generator=g) for _ in range(3))
        second = second.square() * (1e-20 if i == 4 else 1.0)
        correction = torch.tensor(0.3) if i in (2, 3) else 0.3
        moments = AdamMoments(first=first, second=second, correction=correction, epsilon=1e-8)
        stepped.append((update, None if i == 7 else gradient.to(dtype), None if i == 8 else moments))
    take_before([update for update, _, _ in stepped])
    for update, _, _ in stepped:
        update.weight.add_(torch.randn(update.weight.shape, generator=g).to(dtype), alpha=0.01)
    apart = [update.after(gradient, moments) for update, gradient, moments in stepped]
    for one, other in zip(after_all(stepped), apart, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=0, equal_nan=True)

"""Every statistic against float64 NumPy and SciPy, however the data arrive."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from stabilitylab.outliers.channels import ChannelStatistics, median_magnitude


def activations(*, rows: int = 400, channels: int = 24, seed: int = 0) -> torch.Tensor:
    """Skewed, heavy-tailed, with one channel far out and one position that is massive."""
    dice = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(rows, channels, generator=dice).exp()
        - 1
        + 0.3 * torch.randn(rows, channels, generator=dice)
    )
    x[:, 5] *= 40
    x[rows // 2, 7] = -3000.0
    return x


def seen(*parts: torch.Tensor, channels: int = 24) -> ChannelStatistics:
    one = ChannelStatistics(channels)
    assert all(one.add(part) for part in parts)
    return one


@pytest.mark.parametrize("shift", [0.0, 30.0, -1000.0])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12], ids=str)
def test_statistics_are_those_of_the_whole_in_float64(shift, size):
    x = (activations() + shift) * size
    one = seen(*x.split(130))
    exact = x.double().numpy()
    assert one.positions == 400
    assert one.values == exact.size
    np.testing.assert_array_equal(one.low_C, exact.min(0))
    np.testing.assert_array_equal(one.high_C, exact.max(0))
    largest = np.abs(exact).max(0)
    np.testing.assert_array_equal(one.largest, largest)
    assert one.absmax == largest.max()
    assert one.median_channel == np.median(largest)
    np.testing.assert_allclose(one.times_median, largest / np.median(largest))
    # Rounding of x - c in float32: 2^-24 of the shift, against a spread of about 100.
    tolerance = 1e-5 + abs(shift) * 2.0**-24
    assert one.mean == pytest.approx(exact.mean(), rel=1e-5, abs=size * 1e-5)
    np.testing.assert_allclose(one.channel_rms, np.sqrt((exact**2).mean(0)), rtol=tolerance)
    assert one.kurtosis == pytest.approx(scipy.stats.kurtosis(exact, axis=None, fisher=False), rel=1e-4)


def test_counts_are_those_of_a_naive_count():
    parts = activations().split(130)
    one = seen(*parts)
    over, sigma, massive = (np.zeros(24, dtype=int) for _ in range(3))
    for part in parts:
        x = part.double().numpy()
        over += (np.abs(x) >= 6).sum(0)
        sigma += (np.abs(x - x.mean()) >= 6 * x.std()).sum(0)
        massive += ((np.abs(x) > 100) & (np.abs(x) >= 1000 * np.median(np.abs(x)))).sum(0)
    np.testing.assert_array_equal(one.over_6_C, over)
    np.testing.assert_array_equal(one.over_6_sigma_C, sigma)
    np.testing.assert_array_equal(one.massive_C, massive)
    assert over.sum() > 24
    assert sigma.sum() > 0
    assert massive[7] == 1


def test_thresholds_count_what_equals_them():
    x = torch.zeros(1, 4, 3)
    x[0, 1, 0], x[0, 2, 0], x[0, 3, 1] = 6.0, -6.0, float(np.nextafter(np.float32(6), np.float32(0)))
    assert seen(x, channels=3).over_6_C.tolist() == [2, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_formats_count_as_what_they_hold(dtype):
    x = activations().to(dtype)
    one, exact = seen(x), x.double().numpy()
    np.testing.assert_array_equal(one.largest, np.abs(exact).max(0))
    assert one.kurtosis == pytest.approx(scipy.stats.kurtosis(exact, axis=None, fisher=False), rel=1e-4)


def test_the_first_position_of_a_row_is_told_from_the_rest():
    first = torch.ones(1, 6, 24)
    first[0, 0, 3], first[0, 4, 9] = 500.0, -7.0
    one = seen(first, torch.ones(1, 1, 24), torch.full((2, 24), 2.0))
    assert one.largest[[3, 9]].tolist() == [500.0, 7.0]
    # What has no first position among others (one position alone, no row at all) counts in full.
    assert one.elsewhere_C[[3, 9, 0]].tolist() == [2.0, 7.0, 2.0]
    assert one.elsewhere_over_median.max() == 3.5


def test_memory_does_not_grow_with_the_text():
    one = seen(activations())
    before = one.nbytes
    for seed in range(20):
        one.add(activations(rows=200, seed=seed))
    assert one.nbytes == before <= 24 * 72


def test_nothing_changes_where_a_value_is_not_finite():
    for bad in (float("nan"), float("inf"), -float("inf")):
        one, x = seen(activations()), activations()
        x[3, 3] = bad
        before = {name: np.copy(value) for name, value in vars(one).items()}
        assert not one.add(x)
        for name, value in before.items():
            np.testing.assert_array_equal(value, vars(one)[name])


def test_degenerate_sites_have_no_kurtosis_and_do_not_fail():
    one = seen(torch.zeros(4, 3), torch.zeros(0, 3), channels=3)
    assert np.isnan(one.kurtosis)
    assert np.isnan(one.times_median).all()
    assert one.positions == 4


@pytest.mark.parametrize("channels", [24, 576, 4096, 65537])
def test_the_sampled_median_sees_every_channel(channels):
    """A fifth of the channels is large: a stride that met only those, or none, would be far off."""
    rows = max(3, 300_000 // channels)
    x = torch.rand(rows, channels, generator=torch.Generator().manual_seed(2)) + 1
    x[:, : channels // 5] += 100
    # 65,536 of the values: the median's quantile is off by 1 / (2 sqrt(65536)) = 0.2 %, five times that is 1 %.
    assert median_magnitude(x) == pytest.approx(float(x.double().abs().median()), rel=0.01)

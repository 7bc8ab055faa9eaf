"""Tail quantiles against numpy's, of distributions whose tails are known.

With a = -d log N / d log x the slope of the tail, N elements above x, h = 1/8 the widest bin:

    interpolation   |da/d log x| h^2 / (8 a), at its largest within a bin's reach
    chance          of the r-th largest element, log N is known to 1/(2 sqrt(r)) between the edges of a bin, where it
                    is exact; five times that, and as a shift of log x, divided by a
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from stabilitylab.statistics.buffer import Buffer
from stabilitylab.statistics.summary import COLUMN, Summary
from stabilitylab.statistics.tails import TAIL_SHARES, tail_quantiles

WIDTH = 1 / 8
COUNT = 2_000_000
TAILS = {
    "normal": scipy.stats.halfnorm(),
    "Laplace": scipy.stats.expon(),
    "Student": scipy.stats.t(3),
    "log-normal": scipy.stats.lognorm(1.0),
    "Pareto": scipy.stats.pareto(1.5),
}


def quantiles(x: np.ndarray) -> np.ndarray:
    buffer = Buffer()
    summary = Summary(buffer, full=True)
    for part in torch.from_numpy(x).float().reshape(4, -1, 100):
        summary.add(part)
    assert summary.row is not None
    assert summary.tail is not None
    row = buffer.view(summary.row).numpy()
    known = (row[[COLUMN[name]]] for name in ("count", "absmax", "tail_from"))
    return tail_quantiles(buffer.view(summary.tail).numpy()[None], *known)[0]


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("scale", [1.0, 3e-4, 4.0])
def test_quantiles_are_numpys(name: str, scale: float) -> None:
    tail = TAILS[name]
    x = tail.rvs(COUNT, random_state=1)
    found = quantiles(x * scale)
    for share, value in zip(TAIL_SHARES, found, strict=True):
        exact = np.quantile(np.abs(x), 1 - share, method="higher")
        at = np.log(exact) + np.linspace(-WIDTH, WIDTH, 9)
        slope = -np.gradient(np.log(tail.sf(np.exp(at))), at)
        bend = np.abs(np.gradient(slope, at))
        interpolation = np.max(bend / slope) * WIDTH**2 / 8
        chance = 5 / (2 * np.sqrt(share * COUNT)) / slope.min()
        assert abs(np.log(value / (exact * scale))) <= min(interpolation + chance, np.log1p(WIDTH)), share


def test_many_elements_place_a_quantile_to_a_half_percent() -> None:
    """Of a grid that leaves nothing to chance, where one element is little: the interpolation alone."""
    for tail in (TAILS["normal"], TAILS["Laplace"], TAILS["Pareto"]):
        x = tail.isf((np.random.default_rng(0).permutation(COUNT) + 0.5) / COUNT)
        for share, value in zip(TAIL_SHARES[:2], quantiles(x)[:2], strict=True):
            assert value == pytest.approx(np.quantile(np.abs(x), 1 - share), rel=0.005)


def test_the_largest_is_exact() -> None:
    x = np.zeros(400_000)
    x[-1] = 3.25
    assert quantiles(x)[-1] == 3.25
    # Where all are alike there is no slope to follow: the bin is all that is known.
    assert quantiles(np.full(400_000, 0.7)).tolist() == pytest.approx([0.7] * 4, rel=WIDTH)

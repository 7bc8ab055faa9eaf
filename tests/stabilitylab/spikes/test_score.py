"""The spike score against a naive twin; detrended, on a fall; in pieces; on degenerate curves."""

import math

import numpy as np
import pytest

from stabilitylab.spikes import spike_score
from stabilitylab.spikes.score import MINIMUM, SpikeScore
from tests.stabilitylab.spikes.curves import bump, falling


def naive(values, window, sigmas):
    spikes = 0
    for t in range(MINIMUM, len(values)):
        past = values[max(0, t - window) : t]
        spikes += abs(values[t] - past.mean()) >= sigmas * past.std()
    return spikes / len(values)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [100, 1000])
def test_against_a_naive_twin(seed, window):
    values = falling(3000, seed)
    for at in (700, 1500, 2200):
        bump(values, at, 2.0, decay=2)
    score = spike_score(values, window=window)
    assert score == pytest.approx(naive(values, window, 7.0))
    assert window == 1000 or score > 0


def test_detrending_finds_what_the_fall_hides():
    values = falling(1500, pace=600)
    values[500] += 0.5
    assert spike_score(values) == 0.0
    assert spike_score(values, detrend=True) == pytest.approx(1 / 1500)


def test_pieces_make_the_whole():
    values = falling(5000)
    values[[1200, 3100, 4000]] += 3.0
    for detrend in (False, True):
        score = SpikeScore(detrend=detrend)
        for piece in np.array_split(values, 23):
            score.add(piece)
        assert score.value == spike_score(values, detrend=detrend) > 0


@pytest.mark.parametrize("detrend", [False, True])
def test_degenerate_curves(detrend):
    assert math.isnan(spike_score([], detrend=detrend))
    assert math.isnan(spike_score([math.nan] * 50, detrend=detrend))
    assert spike_score([2.0] * 5000, detrend=detrend) == 0.0
    assert spike_score([3.0], detrend=detrend) == 0.0
    with_gaps = np.full(3000, 2.0) + 0.01 * np.random.default_rng(0).standard_normal(3000)
    with_gaps[::7] = math.nan
    assert spike_score(with_gaps, detrend=detrend) == 0.0

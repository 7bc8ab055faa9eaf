"""The compiled passes against their twins: NumPy's medians one by one, pandas, and the detector value by value."""

import json

import numpy as np
import pytest

from stabilitylab.spikes import SpikeDetector, series
from stabilitylab.spikes.offline import feed
from stabilitylab.telemetry import GRADIENT_NORM, LOSS
from tests.stabilitylab.spikes.curves import falling


@pytest.fixture(params=["compiled", "twin"])
def way(request, monkeypatch):
    """Each test once with the library, once as if there were no compiler."""
    if request.param == "twin":
        monkeypatch.setattr(series, "library", lambda: None)
        monkeypatch.setattr("stabilitylab.spikes.offline.library", lambda: None)
    elif series.library() is None:
        pytest.skip("no C compiler here")


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 0), (15, 15), (7, 8), (30, 0), (400, 400)])
def test_rolling_medians_are_those_of_each_window(way, before, after):
    x = np.round(np.random.default_rng(before).standard_normal(300), 1)  # with equal ones
    right = [np.median(x[max(0, i - before) : i + after + 1]) for i in range(len(x))]
    assert np.array_equal(series.rolling_median(x, before, after), right)


def test_a_rolling_mean_counts_whole_windows_only():
    x = np.random.default_rng(0).standard_normal(50)
    right = [0.0] * 3 + [x[i - 3 : i + 1].mean() for i in range(3, 50)]
    np.testing.assert_allclose(series.rolling_mean(x, 4), right, rtol=0, atol=1e-15)
    assert series.rolling_mean(x[:3], 4).tolist() == [0.0] * 3


def test_far_out_is_by_the_window_before(way):
    """One huge value must not blur the windows after it: sums keep what rounding drops."""
    rng = np.random.default_rng(1)
    x = 2 + 0.1 * rng.standard_normal(1500)
    x[300] = 1e9
    x[[700, 900]] += 2
    out = series.far_out(x, 200, 32, 7.0, x)
    right = [
        i >= 32 and abs(x[i] - x[max(0, i - 200) : i].mean()) >= 7 * x[max(0, i - 200) : i].std()
        for i in range(len(x))
    ]
    assert np.flatnonzero(out).tolist() == np.flatnonzero(right).tolist() == [300, 700, 900]


def curve(seed):
    """Noise of every sort, spikes, rounding, repeats, gaps, NaN, steps that go back."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(600, 2500))
    loss = falling(n, seed, noise=0.0)
    noise = (
        rng.standard_t(3, n) if seed % 3 == 0 else np.convolve(rng.standard_normal(n), [1, 0.8, 0.5], "same")
    )
    loss = loss * (1 + rng.choice([0.01, 0.1]) * noise)
    for at in rng.integers(300, n, 4):
        loss[at : at + 6] += rng.uniform(0.2, 2)
    if seed % 4 == 1:
        loss = np.round(loss, 2)
    if seed % 4 == 2:
        loss[rng.integers(0, n, 3)] = np.nan
    steps = np.arange(n)
    if seed % 5 == 3:
        steps[n // 2 :] += 300
    if seed % 5 == 4:
        steps[n // 2 :] -= 100
    return steps, loss, np.exp(0.3 * rng.standard_normal(n))


@pytest.mark.parametrize("seed", range(8))
def test_a_log_at_speed_leaves_the_state_that_its_values_leave_one_by_one(way, seed):
    steps, loss, norm = curve(seed)
    fast, slow = SpikeDetector(), SpikeDetector()
    told = feed(fast, steps, {LOSS: loss, GRADIENT_NORM: norm})
    right, last = [], None
    for step, a, b in zip(steps.tolist(), loss.tolist(), norm.tolist(), strict=True):
        if last is not None and step < last:
            right += slow.finish()
        right += slow.update(step, {LOSS: a, GRADIENT_NORM: b})
        last = step
    assert [(one.step, one.kind, one.data) for one in told] == [(e.step, e.kind, e.data) for e in right]
    assert json.dumps(fast.state_dict()["loss"]) == json.dumps(slow.state_dict()["loss"])
    assert json.dumps(fast.state_dict()["stillness"]) == json.dumps(slow.state_dict()["stillness"])

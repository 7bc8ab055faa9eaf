"""The precursor trial's trend: minus where a line through the last values is going, and minus its slope."""

import numpy as np
import pytest

from experiments.benchmarks.precursor_trial import EVERY, HORIZON, PAST, trend


def test_a_line_is_followed_to_the_horizon_and_noise_is_not():
    falling = 2 - 0.1 * np.arange(30)
    foreseen, slope = trend(falling)
    assert slope[3:] == pytest.approx(0.1)
    assert (slope[:3] == 0).all()
    # From the middle of the values that it goes through.
    middle = falling[29 - PAST + 1 :].mean()
    assert foreseen[-1] == pytest.approx(-(middle - 0.1 * HORIZON / EVERY))
    alternating = np.where(np.arange(30) % 2, 1.1, 0.9)
    foreseen, slope = trend(alternating)
    assert np.abs(slope[PAST:]).max() < 0.02
    assert foreseen[PAST:] == pytest.approx(-1.0, abs=0.2)

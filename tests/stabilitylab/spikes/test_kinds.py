"""Kinds of curves at which a detector once failed, each with the right answer."""

import math

import numpy as np
import pytest

from stabilitylab.spikes import SpikeDetector, episodes_of, find_episodes
from stabilitylab.telemetry import BATCH_SIZE, DATA_PHASE, GRADIENT_NORM, LEARNING_RATE, LOSS


def fall(n, low=2.0):
    return low + 3 * np.exp(-8 * np.arange(n) / n)


def gauss(n, seed=0):
    return np.random.default_rng(seed).standard_normal(n)


def coloured(n, seed, rho=0.0, df=None):
    """Noise of deviation 1: an AR(1), or Student's t."""
    rng = np.random.default_rng(seed)
    if df is not None:
        return rng.standard_t(df, n) / math.sqrt(df / (df - 2))
    y = rng.standard_normal(n)
    for i in range(1, n):
        y[i] = rho * y[i - 1] + math.sqrt(1 - rho * rho) * y[i]
    return y


def kinds(episodes):
    return [one.kind for one in episodes]


# ---------------------------------------------------------------------------------------------------- no event


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
@pytest.mark.parametrize(("rho", "df"), [(0.0, None), (0.5, None), (0.9, None), (0.0, 3)])
def test_noise_of_any_size_and_colour_is_no_event_of_the_state(noise, rho, df):
    noises = [coloured(3000, seed, rho, df) for seed in range(3)]
    found = [one for z in noises for one in find_episodes(None, fall(3000) * (1 + noise * z))]
    assert set(kinds(found)) <= (set() if df is None else {"hard-batch"})


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_one_low_value_is_none(value):
    curve = fall(2000) * (1 + 0.01 * gauss(2000))
    curve[1000] *= value
    assert find_episodes(None, curve) == []


def test_low_last_batches_of_epochs_are_none():
    curve = fall(3000) * (1 + 0.02 * gauss(3000))
    curve[199::200] *= 0.4
    assert find_episodes(None, curve) == []


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_losses_around_zero_are_judged_by_their_noise(seed):
    assert find_episodes(None, np.random.default_rng(seed).normal(0, 0.01, 2000)) == []
    burst = np.random.default_rng(seed).normal(0, 0.004, 1000)
    burst[700:712] *= 50
    (one,) = find_episodes(None, burst)
    assert one.kind == "spike"
    assert one.onset in range(700, 704)


def test_rounded_losses_near_zero_make_no_spikes():
    values = np.round(np.abs(np.random.default_rng(0).standard_t(2, 2000)) * 2e-4, 4)
    assert set(kinds(find_episodes(None, values))) <= {"hard-batch"}


# ---------------------------------------------------------------------------------------------------- divergences


def test_what_explodes_and_stays_wild_is_one_divergence():
    curve = np.concatenate([fall(600) * (1 + 0.01 * gauss(600)), 55 * (1 + 0.2 * gauss(900, 1))])
    curve[600:602] = [9.3, 144]
    (one,) = find_episodes(None, curve)
    assert (one.kind, one.onset) == ("divergence", 600)


def test_out_for_most_of_the_log_is_one_divergence():
    wild = np.exp(np.random.default_rng(0).normal(math.log(50), 0.8, 900))
    (one,) = find_episodes(None, np.concatenate([fall(600) * (1 + 0.01 * gauss(600)), wild]))
    assert (one.kind, one.onset) == ("divergence", 600)


def test_out_for_thousands_of_values_stays_a_divergence_when_it_comes_back():
    curve = fall(5000) * (1 + 0.01 * gauss(5000))
    curve[200:4000] += 3 + 0.8 * gauss(3800, 1)
    (one,) = find_episodes(None, curve)
    assert one.kind == "divergence"
    assert one.onset in range(198, 203)


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_rise_after_a_fast_fall_is_a_divergence(seed):
    trend = np.r_[np.linspace(5.2, 4.1, 10), np.linspace(4.1, 4.9, 80)]
    (one,) = find_episodes(None, trend * (1 + 0.02 * gauss(90, seed)))
    assert one.kind == "divergence"


@pytest.mark.parametrize("seed", range(5))
def test_a_climb_whose_noise_grows_with_it_is_told_while_it_climbs(seed):
    """From 5.3 to four times that in 250 steps, its noise from 2 % to 10 %: each block has learned more noise than the last."""
    step = np.arange(500)
    climbed = np.clip((step - 100) / 250, 0, 1)
    noise = 0.02 + 0.08 * np.clip((step - 100) / 150, 0, 1)
    losses = 5.3 * 4 ** (climbed**2) * (1 + noise * gauss(500, seed))
    detector = SpikeDetector()
    told = [event for i, x in enumerate(losses) for event in detector.update(i, {LOSS: float(x)})]
    assert [event.kind for event in told] == ["divergence"]


@pytest.mark.parametrize("seed", range(5))
def test_stuck_higher_for_good_is_a_divergence(seed):
    curve = np.where(np.arange(61) < 40, 5.72, 5.81) + 0.004 * gauss(61, seed)
    (one,) = find_episodes(None, curve)
    assert one.kind == "divergence"
    assert one.onset in range(38, 42)


# ---------------------------------------------------------------------------------------------------- spikes


@pytest.mark.parametrize("seed", range(5))
def test_a_short_log_shows_its_spike(seed):
    curve = fall(51) * (1 + 0.01 * gauss(51, seed))
    curve[35:39] *= 1.09
    (one,) = find_episodes(None, curve)
    assert one.kind == "spike"
    assert one.onset in range(34, 37)


def test_a_spike_before_a_gap_is_judged_by_the_value_after_it():
    curve = fall(400) * (1 + 0.01 * gauss(400))
    curve[205:210] *= 1.5
    steps = np.arange(400)
    steps[210:] += 100
    (one,) = find_episodes(steps, curve)
    assert (one.kind, one.onset, one.end) == ("spike", 205, 209)


def test_a_small_rise_that_half_stays_tells_the_level_after_it():
    t = np.arange(6000)
    level = np.where(t < 3000, 1.96, 1.975 + 0.045 * np.exp(-(t - 3000) / 60))
    (one,) = find_episodes(None, level + 0.008 * gauss(6000))
    assert one.kind == "spike"
    assert one.end_level - one.level == pytest.approx(0.02, abs=0.012)


def test_smoothing_is_noticed_and_undone():
    raw = fall(3000) * (1 + 0.02 * gauss(3000))
    raw[150::75] *= 2
    smooth = [raw[0]]
    for x in raw[1:]:
        smooth.append(0.9 * smooth[-1] + 0.1 * x)
    found = find_episodes(None, smooth)
    assert kinds(found) == ["hard-batch"] * 38
    assert "exponential mean of 0.9" in found[3].reason or "every 75 steps" in found[3].reason


# ------------------------------------------------------------------------------------- values that say nothing


def test_a_dead_loss_is_an_episode_of_its_own_kind():
    curve = fall(400) * (1 + 0.02 * gauss(400))
    curve[150:] = 0.0
    (one,) = find_episodes(None, curve)
    assert (one.kind, one.onset, one.to_the_end) == ("dead", 150, True)


def test_a_frozen_loss_is_one_and_rounded_repeats_are_not():
    curve = fall(400) * (1 + 0.02 * gauss(400))
    curve[150:] = curve[150]
    (one,) = find_episodes(None, curve)
    assert (one.kind, one.onset) == ("frozen", 150)
    assert find_episodes(None, np.round(fall(3000) * (1 + 0.004 * gauss(3000)), 1)) == []


def test_every_second_value_not_a_number_is_one_burst():
    curve = fall(600) * (1 + 0.02 * gauss(600))
    curve[200:400:2] = math.nan
    (one,) = find_episodes(None, curve)
    assert (one.kind, one.onset, one.end) == ("non-finite", 200, 398)


@pytest.mark.parametrize("end", [1.7976931348623157e308, 3.4028234663852886e38, -3.4028234663852886e38])
def test_the_end_of_a_number_type_is_not_finite(end):
    curve = fall(400) * (1 + 0.02 * gauss(400))
    curve[200] = end
    (one,) = find_episodes(None, curve)
    assert (one.kind, one.height) == ("non-finite", None)


def test_zeros_beside_a_norm_that_is_not_finite_are_its_burst():
    detector, events = SpikeDetector(), []
    curve = fall(400) * (1 + 0.02 * gauss(400))
    for i in range(400):
        filtered = i >= 200
        values = {LOSS: 0.0 if filtered else curve[i], GRADIENT_NORM: math.nan if filtered else 1.0}
        events += detector.update(i, values)
    (one,) = episodes_of(events + detector.finish())
    assert (one.kind, one.signal, one.onset, one.to_the_end) == ("non-finite", GRADIENT_NORM, 200, True)


# ------------------------------------------------------------------------------------------- reasons, rewinds


@pytest.mark.parametrize(
    ("name", "before", "after", "words"),
    [
        (LEARNING_RATE, 1e-4, 1e-3, "learning rate 0.0001 -> 0.001"),
        (BATCH_SIZE, 256.0, 512.0, "batch size 256 -> 512"),
        (DATA_PHASE, 0.0, 1.0, "data phase 0 -> 1"),
    ],
)
def test_a_step_that_the_log_explains_carries_its_reason(name, before, after, words):
    curve = fall(1500) * (1 + 0.01 * gauss(1500))
    curve[1000:] *= 1.2
    detector, events = SpikeDetector(), []
    for i, x in enumerate(curve.tolist()):
        events += detector.update(i, {LOSS: x, name: before if i < 998 else after})
    (one,) = episodes_of(events + detector.finish())
    assert one.reason is not None
    assert one.reason.startswith(words)
    assert "step 998" in one.reason


def test_what_a_rewind_supersedes_is_gone():
    curve = fall(600) * (1 + 0.01 * gauss(600))
    detector, events = SpikeDetector(), []
    for i in range(220):
        values = {LOSS: curve[i] + (5 if i >= 200 else 0), GRADIENT_NORM: 100.0 if i >= 198 else 1.0}
        events += detector.update(i, values)
    assert "spike" in [one.kind for one in events]
    later = [e for i in range(150, 600) for e in detector.update(i, {LOSS: curve[i], GRADIENT_NORM: 1.0})]
    assert later + detector.finish() == []


# ------------------------------------------------------------------------------------- seen from both sides


@pytest.mark.parametrize("seed", range(3))
def test_a_rise_over_a_hundred_values_is_a_spike(seed):
    n, length = 1200, 160
    curve = fall(n) * (1 + 0.03 * gauss(n, seed))
    curve[600 : 600 + length] += 0.6 * np.sin(np.pi * np.arange(length) / length)
    (episode,) = find_episodes(None, curve)
    assert episode.kind == "spike"
    assert 600 <= episode.onset <= 650
    assert 700 <= episode.end <= 600 + length


def test_a_plateau_that_leans_up_before_it_falls_is_none():
    """Epochs of a small data set: the loss creeps up within one and falls at its end."""
    epoch, within = np.divmod(np.arange(4000), 1000)
    for seed in range(4):
        curve = 2.3 * 0.8**epoch * (1 + 0.03 * within / 1000) * (1 + 0.02 * gauss(4000, seed))
        assert find_episodes(None, curve) == []


def test_a_long_flat_top_that_falls_back_at_once_is_a_spike():
    curve = fall(2500) * (1 + 0.01 * gauss(2500))
    curve[1500:1650] += 0.8
    (episode,) = find_episodes(None, curve)
    assert (episode.kind, episode.onset, episode.end) == ("spike", 1500, 1649)


def test_what_has_come_down_by_half_at_the_end_of_a_short_log_is_a_spike():
    t = np.arange(100)
    curve = (2 + 6 * (1 + t / 30) ** -0.35) * (1 + 0.01 * gauss(100))
    curve[55:] += 4 * np.exp(-np.arange(45) / 30)
    assert kinds(find_episodes(None, curve)) == ["spike"]


@pytest.mark.parametrize("seed", range(4))
def test_a_step_after_a_fast_fall_is_no_return_from_a_dip(seed):
    n = 98
    curve = 2.33 + 3 * np.exp(-12 * np.arange(n) / n) + 0.004 * gauss(n, seed)
    curve[53:] += 0.055
    (episode,) = find_episodes(None, curve)
    assert (episode.kind, episode.onset) == ("divergence", 53)


@pytest.mark.parametrize("noise", ["t", "lognormal"])
def test_single_values_that_the_noise_throws_out_are_no_spikes_in_a_sparse_log(noise):
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, 4000) if noise == "t" else np.exp(0.6 * rng.standard_normal(4000)) - 1.2
    episodes = find_episodes(5 * np.arange(4000), fall(4000) * (1 + 0.03 * x))
    assert set(kinds(episodes)) <= {"hard-batch"}


def test_spikes_of_even_noise_do_not_widen_its_limits():
    """In a sparse log of Gaussian noise every hundredth value is a spike: that is no tail."""
    curve = fall(3000) * (1 + 0.01 * gauss(3000))
    at = np.arange(550, 3000, 100)
    curve[at] *= 1.13
    events = []
    detector = SpikeDetector()
    for step, loss in zip((5 * np.arange(3000)).tolist(), curve.tolist(), strict=True):
        events += detector.update(step, {LOSS: loss})
    told = [one.onset // 5 for one in episodes_of(events) if one.kind == "spike"]
    assert told == at.tolist()


def test_the_value_before_the_first_over_the_limit_belongs_to_it():
    curve = np.full(400, 2.0) + 0.02 * gauss(400)
    curve[300:303] = 2.09, 2.6, 2.5
    detector = SpikeDetector()
    (episode,) = episodes_of(e for i, x in enumerate(curve.tolist()) for e in detector.update(i, {LOSS: x}))
    assert (episode.kind, episode.onset, episode.end) == ("spike", 300, 302)


def test_a_smoothed_log_in_which_most_hard_batches_drown_is_noticed():
    raw = fall(3000) * (1 + 0.04 * gauss(3000))
    at = np.arange(150, 2950, 75)
    raw[at] += 1.4
    raw[1050] += 3
    losses, mean = np.empty(3000), raw[0]
    for i, x in enumerate(raw):
        mean = losses[i] = 0.95 * mean + 0.05 * x
    episodes = find_episodes(None, losses)
    assert [one.onset for one in episodes] == at.tolist()
    assert set(kinds(episodes)) == {"hard-batch"}


# ------------------------------------------------------------------------------------- the first values, and plateaus


def told_online(curve):
    """Indices at which the detector first says that the state left."""
    detector, told = SpikeDetector(), {}
    for step, loss in enumerate(curve.tolist()):
        for event in detector.update(step, {LOSS: loss}):
            if event.kind != "hard-batch":
                told.setdefault(event.data["episode"], step)
    return sorted(told.values())


@pytest.mark.parametrize("at", [24, 40, 60])
@pytest.mark.parametrize("seed", range(3))
def test_three_values_over_those_before_are_told_at_the_third_on_any_fall(at, seed):
    """A fall of hundreds of deviations is in the scales by then; neighbours do not show it."""
    curve = 2 + 6 * np.exp(-9 * np.arange(90) / 90) + 0.02 * gauss(90, seed)
    curve[at:] += 1.0
    assert told_online(curve)[:1] == [at + 2]


@pytest.mark.parametrize("df", [3, None])
def test_the_end_of_a_plateau_is_no_excursion(df):
    stairs = 3 * 0.85 ** (np.arange(240) // 48)
    for seed in range(8):
        curve = stairs * (1 + 0.007 * coloured(240, seed, 0.0, df))
        assert set(kinds(find_episodes(None, curve))) <= {"hard-batch"}
        assert told_online(curve) == []


def test_the_first_losses_of_small_batches_are_none():
    """From a fine-tuning loop with batches of 4: the difference of three values is no trend."""
    losses = [
        0.21,
        0.69,
        1.02,
        2.58,
        2.52,
        0.74,
        3.19,
        0.73,
        2.53,
        1.3,
        3.66,
        0.4,
        2.9,
        1.07,
        0.72,
        5.52,
        0.98,
    ]
    assert told_online(np.array(losses)) == []


def smoothed_with_hard_batches(n=2400, factor=0.9, seed=0):
    raw = 3 + 2 * np.exp(-4 * np.arange(n) / n) + 0.05 * gauss(n, seed)
    raw[200::60] += 2.0
    mean, out = raw[0], []
    for x in raw:
        mean = factor * mean + (1 - factor) * x
        out.append(mean)
    return np.array(out)


@pytest.mark.parametrize("factor", [0.8, 0.9, 0.95])
def test_hard_batches_in_a_smoothed_log_are_known_after_two(factor):
    assert len(told_online(smoothed_with_hard_batches(factor=factor))) <= 3


def test_decaying_spikes_in_white_noise_stay_spikes():
    curve = 3 + 0.05 * gauss(2400)
    starts = list(range(200, 2300, 300))
    for at in starts:
        curve[at:] += 1.5 * 0.9 ** np.arange(2400 - at)
    assert len(told_online(curve)) == len(starts)

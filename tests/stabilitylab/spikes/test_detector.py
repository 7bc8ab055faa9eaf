"""The detector on curves whose events are known: kinds, timing, and the gaps and faults of real logs."""

import json
import math

import numpy as np
import pytest

from stabilitylab.spikes import SpikeDetector, episodes_of, find_episodes
from stabilitylab.spikes.offline import feed_losses
from stabilitylab.telemetry import GRADIENT_NORM, LEARNING_RATE, LOSS, SKIPPED
from tests.stabilitylab.spikes.curves import bump, falling


def told(steps, losses, **signals):
    """Events of the online detector, one update a step."""
    detector = SpikeDetector()
    events = []
    for i, step in enumerate(steps):
        values = {LOSS: losses[i]} | {name: column[i] for name, column in signals.items()}
        events += detector.update(int(step), {name: float(v) for name, v in values.items() if v is not None})
    return events + detector.finish()


def kinds(episodes):
    return [episode.kind for episode in episodes]


# ---------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize("seed", range(8))
def test_a_healthy_curve_has_no_episodes(seed):
    assert find_episodes(None, falling(8000, seed)) == []


def test_heavy_tails_are_at_most_hard_batches():
    noise = 0.04 * np.random.default_rng(1).standard_t(3, 20_000)
    assert set(kinds(find_episodes(None, falling(20_000, noise=0.0) + noise))) <= {"hard-batch"}


@pytest.mark.parametrize("width", [1, 2])
def test_one_or_two_steps_are_a_hard_batch(width):
    curve = falling(2000)
    curve[1200 : 1200 + width] += 1.0
    (episode,) = find_episodes(None, curve)
    assert (episode.kind, episode.onset, episode.end) == ("hard-batch", 1200, 1199 + width)
    assert episode.height == pytest.approx(1.0, abs=6 * 0.03)


def test_a_decaying_excursion_is_a_spike_with_its_peak_and_end():
    curve = falling(2000)
    bump(curve, 1200, 0.8, decay=8)
    (episode,) = find_episodes(None, curve)
    assert episode.kind == "spike"
    assert episode.onset == 1200
    assert episode.peak in range(1200, 1203)
    assert episode.end in range(1206, 1230)  # 0.8 exp(-t/8) passes 3 sigma at t = 17
    assert episode.height == pytest.approx(0.8, abs=6 * 0.03)


def test_a_single_value_of_a_sparse_log_may_have_lasted_and_is_a_spike():
    curve = falling(2000)
    curve[1200] += 1.0
    (episode,) = find_episodes(5 * np.arange(2000), curve)
    assert (episode.kind, episode.onset) == ("spike", 6000)


def test_a_level_that_stays_up_is_a_divergence_and_what_follows_on_it_is_seen():
    curve = falling(3000)
    curve[1000:] += 2.0
    curve[2000:2010] += 1.0
    first, second = find_episodes(None, curve)
    assert (first.kind, first.onset) == ("divergence", 1000)
    assert (second.kind, second.onset, second.end) == ("spike", 2000, 2009)


def test_a_slow_recovery_is_called_divergence_and_taken_back():
    curve = falling(4000)
    bump(curve, 1000, 3.0, decay=250)
    events = told(range(4000), curve)
    assert "divergence" in [event.kind for event in events]
    (episode,) = episodes_of(events)
    assert episode.kind == "spike"


def test_a_slow_climb_is_a_divergence():
    curve = falling(4000)
    curve[2000:] += np.linspace(
        0, 1.5, 2000
    )  # 0.75 nats per 1,000 steps: invisible from one value to the next
    (episode,) = find_episodes(None, curve)
    assert episode.kind == "divergence"
    assert 2000 <= episode.onset <= 2400


def test_small_but_lasting_is_seen():
    curve = falling(3000, noise=0.02)
    curve[2000:2030] += 0.1  # 5 sigma: no single value is over the limit of 7
    (episode,) = find_episodes(None, curve)
    assert episode.kind == "spike"
    assert abs(episode.onset - 2000) <= 5


def test_two_events_ten_steps_apart_are_two():
    curve = falling(2000)
    curve[1200:1204] += 1.0
    curve[1210:1214] += 0.5
    assert [(e.kind, e.onset) for e in find_episodes(None, curve)] == [("spike", 1200), ("spike", 1210)]


def test_a_spike_on_the_steepest_part_of_the_fall_is_seen():
    curve = falling(2000, pace=300)
    bump(curve, 100, 1.5)
    (episode,) = find_episodes(None, curve)
    assert (episode.kind, episode.onset) == ("spike", 100)


# ------------------------------------------------------------------------------------------------ non-finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_burst_of_non_finite_values_is_one_episode_and_blinds_nothing(bad):
    curve = falling(2000)
    curve[1000:1040] = bad
    curve[1040] += 1.0
    curve[1041] += 1.0
    curve[1042] += 1.0
    first, second = find_episodes(None, curve)
    assert (first.kind, first.onset, first.end, first.height) == ("non-finite", 1000, 1039, None)
    assert (second.kind, second.onset) == ("spike", 1040)


def test_an_all_nan_curve_is_one_non_finite_episode():
    (episode,) = find_episodes(None, [math.nan] * 500)
    assert (episode.kind, episode.onset, episode.end) == ("non-finite", 0, 499)


@pytest.mark.parametrize("values", [[], [3.0], [2.0] * 1000, [0.0] * 1000])
def test_curves_without_events(values):
    assert find_episodes(None, values) == []


def test_an_overflow_that_the_scaler_skips_is_routine():
    curve = falling(300)
    norms = [math.inf if i in (100, 200) else 1.0 for i in range(300)]
    skipped = [float(i in (100, 200)) for i in range(300)]
    scale = [2.0**16 if i <= 100 else 2.0**15 for i in range(300)]
    signals = {GRADIENT_NORM: norms, SKIPPED: skipped, "precision/-/loss_scale": scale}
    assert told(range(300), curve, **signals) == []
    assert kinds(episodes_of(told(range(300), curve, **{GRADIENT_NORM: norms}))) == ["non-finite"] * 2


# ------------------------------------------------------------------------------------------------ loss scale


def test_the_search_for_a_scale_at_the_start_is_routine():
    scale = [max(2.0**15, 2.0 ** (32 - i)) for i in range(400)]
    assert told(range(400), falling(400), **{"precision/-/loss_scale": scale}) == []


def test_four_halvings_without_a_doubling_are_a_collapse():
    scale = [2.0**16] * 300
    for k in range(6):
        scale[200 + 10 * k :] = [2.0 ** (15 - k)] * len(scale[200 + 10 * k :])
    scale[280:] = [2.0**12] * 20
    events = told(range(300), falling(300), **{"precision/-/loss_scale": scale})
    assert [(e.step, e.data["phase"]) for e in events] == [(230, "onset"), (280, "end")]
    (episode,) = episodes_of(events)
    assert (episode.kind, episode.onset, episode.end, episode.height) == (
        "loss-scale-collapse",
        200,
        250,
        6.0,
    )


def test_halvings_with_doublings_between_are_routine():
    scale, x = [], 2.0**16
    for i in range(1000):
        x = x / 2 if i % 100 == 50 else x * 2 if i % 200 == 0 else x
        scale.append(x)
    assert told(range(1000), falling(1000), **{"precision/-/loss_scale": scale}) == []


# ------------------------------------------------------------------------------------------------ companions


def norms_around(n, changes, seed=3):
    norm = 0.3 * np.exp(0.15 * np.random.default_rng(seed).standard_normal(n))
    for at, factor in changes.items():
        norm[at] *= factor
    return norm


def test_a_gradient_norm_that_rose_before_the_loss_makes_it_a_spike():
    curve = falling(2000)
    curve[1504] += 2.0
    lead = norms_around(2000, {1500: 4, 1501: 8, 1502: 20, 1503: 60, 1504: 100})
    episodes = {e.signal: e for e in episodes_of(told(range(2000), curve, **{GRADIENT_NORM: lead}))}
    assert episodes[LOSS].kind == "spike"
    assert episodes[GRADIENT_NORM].onset == 1500
    events = told(range(2000), curve, **{GRADIENT_NORM: lead})
    (onset,) = [e for e in events if e.data["signal"] == LOSS and e.data["phase"] == "onset"]
    assert onset.data["precursors"] == {GRADIENT_NORM: 4}
    first = events[0]
    assert (first.step, first.data["signal"], first.kind) == (1502, GRADIENT_NORM, "spike")


def test_a_gradient_norm_in_the_same_step_leaves_a_hard_batch_one():
    curve = falling(2000)
    curve[1500] += 2.0
    together = norms_around(2000, {1500: 10})
    (episode,) = episodes_of(told(range(2000), curve, **{GRADIENT_NORM: together}))
    assert episode.kind == "hard-batch"


def test_the_norm_of_a_scaled_gradient_moves_with_its_scale():
    scale = np.repeat([1.0, 2, 4, 8, 16, 32, 64, 128], 250)
    norms = norms_around(2000, {}) * scale
    assert told(range(2000), falling(2000), **{GRADIENT_NORM: norms, "precision/-/loss_scale": scale}) == []


def test_a_changed_learning_rate_is_noted():
    curve = falling(2000)
    bump(curve, 1510, 1.0)
    rate = [1e-3 if i < 1500 else 2e-3 for i in range(2000)]
    events = told(range(2000), curve, **{LEARNING_RATE: rate})
    assert events[0].data["learning_rate_change"] == pytest.approx(2.0)


# ------------------------------------------------------------------------ gaps, restarts, resumption


def test_missing_values_are_no_events():
    curve = falling(3000)
    bump(curve, 2000, 1.0)
    keep = np.random.default_rng(0).random(3000) < 0.5
    keep[2000] = True
    (episode,) = find_episodes(np.flatnonzero(keep), curve[keep])
    assert (episode.kind, episode.onset) == ("spike", 2000)


def test_an_interval_that_changes_is_no_event():
    steps = np.r_[np.arange(500), 500 + 10 * np.arange(500), 6000 + 100 * np.arange(200)]
    assert find_episodes(steps, falling(1200)) == []


def test_a_restart_takes_up_the_baseline_of_its_step():
    curve = falling(1000, pace=400, noise=0.01)
    steps = np.r_[np.arange(1000), np.arange(300, 1000)]
    again = np.r_[curve, curve[300:]]
    assert (
        find_episodes(steps, again) == []
    )  # against the baseline of step 999 the curve at 300 would be a spike
    again[1005:1025] += 0.5
    (episode,) = find_episodes(steps, again)
    assert (episode.kind, episode.onset, episode.end) == (
        "spike",
        305,
        327,
    )  # on the fall, the values after it are over the level of before


def test_an_event_right_after_a_resume_is_seen():
    curve = falling(2000)
    steps = np.r_[np.arange(1000), np.arange(900, 1900)]
    curve[1000:] = curve[900:1900]
    curve[1000:1008] += 1.0
    (episode,) = find_episodes(steps, curve)
    assert (episode.kind, episode.onset) == ("spike", 900)


def test_an_event_right_after_a_gap_is_seen():
    curve = falling(2000)
    curve[1000:1008] += 1.0
    steps = np.r_[np.arange(1000), np.arange(5000, 6000)]
    (episode,) = find_episodes(steps, curve)
    assert (episode.kind, episode.onset) == ("spike", 5000)


def test_an_excursion_that_was_rolled_back_is_judged_by_what_was_seen():
    curve = falling(1200)
    curve[1000:1020] += np.linspace(0.5, 3, 20)
    steps = np.r_[np.arange(1020), np.arange(900, 1080)]
    curve[1020:] = curve[900:1080]
    assert kinds(find_episodes(steps, curve))[0] == "divergence"


def test_duplicates_of_a_step_are_ignored():
    curve = falling(1000)
    doubled = np.repeat(curve, 2)
    doubled[1::2] += 3.0
    assert find_episodes(np.repeat(np.arange(1000), 2), doubled) == []


def test_a_resumed_detector_continues_exactly():
    rng = np.random.default_rng(5)
    curve = falling(1500)
    bump(curve, 700, 1.0)
    curve[900:903] = math.nan
    norm = norms_around(1500, {698: 10, 699: 10, 700: 10})
    scale = np.where(np.arange(1500) < 800, 2.0**16, 2.0**10)
    rate = np.where(np.arange(1500) < 690, 1e-3, 2e-3)

    def values(i):
        return {
            LOSS: curve[i],
            GRADIENT_NORM: norm[i],
            "precision/-/loss_scale": scale[i],
            LEARNING_RATE: rate[i],
        }

    whole = SpikeDetector()
    expected = [e for i in range(1500) for e in whole.update(i, values(i))]
    cuts = sorted({*rng.integers(0, 1500, 10).tolist(), 699, 700, 701, 708, 800, 901})
    detector, seen = SpikeDetector(), []
    for i in range(1500):
        if i in cuts:
            state = json.loads(json.dumps(detector.state_dict(), allow_nan=False))
            detector = SpikeDetector()
            detector.load_state_dict(state)
        seen += detector.update(i, values(i))
    assert [(e.step, e.kind, e.data) for e in seen] == [(e.step, e.kind, e.data) for e in expected]
    assert detector.state_dict() == whole.state_dict()
    assert len(expected) > 4


def test_memory_does_not_grow():
    detector = SpikeDetector()
    sizes = []
    for i, x in enumerate(falling(20_000).tolist()):
        detector.update(i, {LOSS: x, GRADIENT_NORM: 1.0})
        if i in (2_000, 19_999):
            sizes.append(len(json.dumps(detector.state_dict())))
    assert sizes[1] < 1.3 * sizes[0]


# ------------------------------------------------------------------------------------------- offline = online


@pytest.mark.parametrize("seed", range(6))
def test_offline_finds_exactly_what_online_finds(seed):
    rng = np.random.default_rng(seed)
    n = 6000
    curve = falling(n, seed, pace=rng.uniform(50, 500), noise=0.0)
    curve += rng.choice([0.002, 0.03, 0.2]) * (rng.standard_t(3, n) if seed % 2 else rng.standard_normal(n))
    for at in rng.integers(100, n - 10, 20):
        bump(curve, at, rng.uniform(0.05, 3), decay=rng.uniform(0.5, 200))
    curve[rng.integers(0, n, 10)] = rng.choice([math.nan, math.inf, -math.inf], 10)
    steps = np.cumsum(rng.choice([1, 1, 1, 5], n)) if seed % 3 else 5 * np.arange(n)
    steps[3000:] -= 700
    steps[4000:] += 10_000
    online = SpikeDetector()
    expected, last = [], steps[0]
    for step, x in zip(steps.tolist(), curve.tolist(), strict=True):
        if step < last:
            expected += online.finish()
        last = step
        expected += online.update(step, {LOSS: x})
    offline = SpikeDetector()
    events = feed_losses(offline, steps, curve)
    assert [(e.step, e.kind, e.data) for e in events] == [(e.step, e.kind, e.data) for e in expected]
    assert json.dumps(offline.state_dict()) == json.dumps(online.state_dict())
    assert events


def test_baselines_agree_to_the_last_bit_on_both_paths():
    curve = falling(5000)
    fast, slow = SpikeDetector(), SpikeDetector()
    feed_losses(fast, np.arange(5000), curve)
    for i, x in enumerate(curve.tolist()):
        slow.update(i, {LOSS: x})
    assert fast.state_dict() == slow.state_dict()


# ------------------------------------------------------------------------------------------- noise of all kinds


@pytest.mark.parametrize(
    "noise",
    [
        lambda rng, n: 1e-4 * rng.standard_normal(n),
        lambda rng, n: 0.3 * rng.standard_normal(n),
        lambda rng, n: np.linspace(0.02, 0.3, n) * rng.standard_normal(n),
        lambda rng, n: np.where(np.arange(n) < n // 2, 0.03, 0.09) * rng.standard_normal(n),
        lambda rng, n: 0.03 * rng.standard_normal(n) + 0.3 * (rng.random(n) < 0.2),
        lambda rng, n: np.convolve(0.1 * rng.standard_normal(n + 49), np.ones(50) / 50, "valid"),
    ],
    ids=["tiny", "large", "growing", "threefold at once", "two kinds of batch", "a moving average"],
)
@pytest.mark.parametrize("seed", range(3))
def test_noise_alone_makes_no_spikes(noise, seed):
    curve = falling(5000, noise=0.0) + noise(np.random.default_rng(seed), 5000)
    found = kinds(find_episodes(None, curve))
    assert found.count("spike") + found.count("divergence") <= 1
    assert found.count("hard-batch") <= 2


def test_a_slow_rise_for_good_is_a_divergence_wherever_it_is_seen_to_begin():
    """Up by 4.5 within 1,350 values and never back: an onset that the second look puts earlier, among values that are still low,
    once made it a spike that was over before the rise."""
    steps_N = np.arange(100_000)
    begins = 92_000
    curve_N = 2.1 + 8 * np.exp(-steps_N / 4_000) + 1.5 * np.exp(-steps_N / 25_000)
    curve_N *= 1 + 0.006 * np.random.default_rng(2).standard_normal(len(steps_N))
    curve_N[begins:] += np.minimum(4.5, (steps_N[begins:] - begins) / 300)
    (found,) = find_episodes(steps_N, curve_N)
    assert found.kind == "divergence"
    assert begins - 500 < found.onset < begins + 100
    assert found.onset <= found.peak <= found.end
    assert found.end_level == pytest.approx(6.63, abs=0.02)

"""The watch reports sites far out of their baseline once, the first in execution order; not what all sites do at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stabilitylab.monitoring.site_watch import QUIET, SiteWatch
from stabilitylab.probes.base import Readings
from stabilitylab.telemetry import Event, Key

SITES = ("head", "blocks.0.up", "blocks.0.down", "blocks.1.up")
ACTIVATIONS = tuple(Key("activation", site, "absmax") for site in SITES)
SCORES = tuple(Key("attention", "blocks.0.attn", "score_max", head) for head in range(4))
ORDER = dict.fromkeys(["attention/blocks.0.attn", "blocks.0.up", "blocks.0.down", "blocks.1.up", "head"])


def watched(noise: float = 0.1, steps: int = 60, seed: int = 0, **factors: dict[int, float]) -> list[Event]:
    """``factors``: step -> factor, of "scores" (head 2) or of activations by the site's last word; a trend runs below."""
    dice, watch = np.random.default_rng(seed), SiteWatch(ORDER)
    events = []
    for step in range(steps):
        activations = np.exp(noise * dice.standard_normal(4) - step / 50)
        scores = np.exp(noise * dice.standard_normal(4))
        scores[2] *= factors.get("scores", {}).get(step, 1.0)
        for i, site in enumerate(SITES):
            activations[i] *= factors.get(site.replace(".", "_"), {}).get(step, 1.0) * factors.get(
                "all", {}
            ).get(step, 1.0)
        events += watch.events(step, [Readings(ACTIVATIONS, activations), Readings(SCORES, scores)])
    return events


def test_one_head_is_named_with_its_factor() -> None:
    (event,) = watched(scores=dict.fromkeys(range(40, 60), 30.0))
    assert (event.step, event.kind) == (40, "site-departure")
    assert (event.data["site"], event.data["index"]) == ("blocks.0.attn", 2)
    assert event.data["factor"] == pytest.approx(30, rel=0.5)


def test_of_several_in_a_step_the_first_executed_is_told() -> None:
    (event,) = watched(head={40: 900.0}, blocks_0_down={40: 30.0})
    assert (event.data["site"], event.data["count"]) == ("blocks.0.down", 2)


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_noise_trends_and_hard_batches_tell_nothing(noise: float) -> None:
    for seed in range(20):
        assert watched(noise, 200, seed, all={150: 20.0}) == []


def test_what_no_batch_does_is_told_whoever_shares_it() -> None:
    (event,) = watched(all={40: 1000.0})
    assert (event.step, event.data["site"], event.data["count"]) == (40, "blocks.0.up", 4)


def test_what_stays_is_told_once_in_a_while() -> None:
    told = [event.step for event in watched(0.1, 200, blocks_0_up=dict.fromkeys(range(40, 200), 50.0))]
    assert told[0] == 40
    assert all(b - a >= QUIET for a, b in itertools.pairwise(told))


def test_sites_that_come_and_go_keep_their_levels() -> None:
    """An expert that some steps do not reach: other sets of keys, the same sites."""
    dice, watch = np.random.default_rng(0), SiteWatch(ORDER)
    events = []
    for step in range(60):
        keys = ACTIVATIONS if step % 3 else ACTIVATIONS[:3]
        values = np.exp(0.1 * dice.standard_normal(len(keys)))
        values[1] *= 30 if step == 51 else 1
        events += watch.events(step, [Readings(tuple(keys), values)])
    (event,) = events
    assert (event.step, event.data["site"]) == (51, "blocks.0.up")


@pytest.mark.parametrize("back", [0, 100])
def test_a_run_that_goes_back_is_judged_by_the_levels_of_then(back: int) -> None:
    """Gradients that fell a hundred million times are as they were at first: nothing has left anything."""
    dice, watch = np.random.default_rng(0), SiteWatch(ORDER)
    events: list[Event] = []
    for step in [*range(300), *range(back, 400)]:
        values = np.exp(0.1 * dice.standard_normal(4) - step / 16)
        values[2] *= 1e4 if step == 390 else 1
        events += watch.events(step, [Readings(ACTIVATIONS, values)])
    (event,) = events
    assert (event.step, event.data["site"]) == (390, "blocks.0.down")

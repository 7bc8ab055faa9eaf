"""Outcomes of several runs on values that are known: published curves, a product taken by hand, planted spikes and forks."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from experiments.cli import main
from experiments.outcomes import WORTSMAN, at_best_rate, lr_sensitivity, survival
from experiments.study import Cell
from experiments.suites.restart_ladder import RAMP, ROWS, SHIFT, mixture
from experiments.suites.spike_harm import STUDY, heldout_after, recovered_spike
from experiments.trial import heldout_loss, trial
from glm.data.mixture import WINDOW, Mixture
from glm.train.replay_forks import Change
from glm.train.state_ring import StateRing
from tests.glm.conftest import data_folder, text_files  # noqa: F401 - fixtures


def test_lr_sensitivity_is_the_mean_regret_over_rates_capped_at_initialisation():
    losses = {-3.0: 5.0, -2.0: 4.0, -1.0: 9.0, 0.0: math.inf, 1.0: math.nan}
    # Regrets over the best, 4: 1, 0, and three times 6 - 4, for a loss at initialisation of 6.
    assert lr_sensitivity(losses, 6.0) == pytest.approx(7 / 5)
    assert lr_sensitivity(dict.fromkeys(losses, 3.0), 6.0) == 0.0
    assert lr_sensitivity(dict.fromkeys(losses, math.inf), 6.0) == 0.0
    assert 2 ** WORTSMAN[0] == pytest.approx(3e-4)
    assert 0.3 <= 2 ** WORTSMAN[-1] <= 0.31


def test_the_best_rate_is_the_lowest_of_equals():
    assert at_best_rate({1.0: 3.0, 2.0: 2.0, 3.0: 2.0, 4.0: math.nan}) == (2.0, 2.0)
    rate, loss = at_best_rate({1.0: math.inf})
    assert math.isnan(rate)
    assert loss == math.inf


# Weeks of remission under 6-mercaptopurine (Freireich et al. 1963; Gehan 1965), the textbooks' example.
RELAPSED = [6, 6, 6, 7, 10, 13, 16, 22, 23]
CENSORED = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]


def test_survival_is_the_textbooks():
    curve = survival(RELAPSED, CENSORED)
    assert curve.steps == (6, 7, 10, 13, 16, 22, 23)
    printed = (0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448)
    assert curve.share == pytest.approx(printed, abs=5e-4)
    # Collett, table 2.4, and survfit(conf.type = "log-log").
    assert (curve.low[0], curve.high[0]) == pytest.approx((0.620, 0.952), abs=5e-4)
    assert (curve.low[-1], curve.high[-1]) == pytest.approx((0.188, 0.680), abs=5e-4)
    assert (curve.runs, curve.collapsed, curve.median) == (21, 9, 23)
    assert (curve.at(5), curve.at(6.5), curve.at(99)) == (1.0, curve.share[0], curve.share[-1])


@pytest.mark.parametrize("seed", range(5))
def test_survival_is_a_product_of_shares(seed):
    rng = np.random.default_rng(seed)
    times, died = rng.integers(1, 12, 20), rng.random(20) < 0.6
    curve = survival(times[died].tolist(), times[~died].tolist())
    alive = 1.0
    for step, share in zip(curve.steps, curve.share, strict=True):
        alive *= 1 - np.sum(died & (times == step)) / np.sum(times >= step)
        assert share == pytest.approx(alive, abs=1e-12)
    assert all(
        low <= share <= high for low, share, high in zip(curve.low, curve.share, curve.high, strict=True)
    )


def test_runs_that_all_lived_or_all_died_have_a_curve():
    assert survival([], [9.0] * 3).at(100) == 1.0
    assert survival([], [9.0] * 3).median == math.inf
    gone = survival([1.0, 2.0, 2.0])
    assert (gone.share[-1], gone.low[-1], gone.high[-1]) == (0.0, 0.0, gone.high[0])


def test_survival_of_a_study_is_a_command(tmp_path, capsys):
    (tmp_path / "restart-ladder").mkdir()
    lived = {"abrupt": [10, 10, math.inf], "ramp": [math.inf] * 3}
    lines = [
        json.dumps({"arm": arm, "seed": seed, "seconds": 1, "values": {"lived": value}})
        for arm, values in lived.items()
        for seed, value in enumerate(values, start=1)
    ]
    (tmp_path / "restart-ladder" / "values.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["survival", "restart-ladder", "--runs", str(tmp_path), "--json"]) == 0
    body = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert body["arms"]["abrupt"]["share"] == [pytest.approx(1 / 3)]
    assert body["arms"]["abrupt"]["collapsed"] == 2
    assert body["arms"]["ramp"] == {
        "runs": 3,
        "collapsed": 0,
        "median": None,
        "steps": [],
        "share": [],
        "low": [],
        "high": [],
    }
    assert main(["survival", "restart-ladder", "--runs", str(tmp_path)]) == 0
    assert "abrupt" in capsys.readouterr().out
    for words, error in (
        (["survival", "recipes", "--runs", str(tmp_path)], "has no outcome that is a time"),
        (["survival", "quick", "--runs", str(tmp_path)], "has no outcome that is a time"),
        (["survival", "restart-ladder", "--runs", str(tmp_path / "none")], "no values of restart-ladder"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert error in said
        assert len(said.splitlines()) == 1


def test_a_recovered_spike_is_found_and_others_are_not():
    rng = np.random.default_rng(0)
    calm = 5 + 0.1 * rng.normal(size=150)
    assert recovered_spike(calm) is None
    spiked = calm.copy()
    spiked[90:92] += 1.5
    assert recovered_spike(spiked) == 90
    assert recovered_spike(spiked, first=93) is None
    lasting = calm.copy()
    lasting[90:] += 1.5
    assert recovered_spike(lasting) is None
    spiked[90:92] = np.inf
    assert recovered_spike(spiked) is None


def test_harm_is_nothing_where_nothing_is_withheld_and_that_of_the_updates_else(data_folder: Path):  # noqa: F811
    """A fork without a change is the run to the bit; with all updates withheld it stays at the state that it came from."""
    small = {"model.layers": "1", "model.hidden": "16", "model.heads": "2", "steps": "60", "batch.rows": "2"}
    arm = STUDY.arms[0]
    cell = dataclasses.replace(STUDY, settings={**STUDY.settings, **small}).cell(arm, 0, data_folder)
    assert isinstance(cell, Cell)
    run = trial(cell.config, data=data_folder, heldout=False, ring=StateRing(every=1, size=99))
    kept = heldout_after(run, cell, 12, None, 15)
    still = heldout_after(run, cell, 12, Change(hold=("*",)), 15)
    assert kept == heldout_after(run, cell, 12, None, 15)
    before = trial(cell.config, data=data_folder, until=12, heldout=False)
    assert still[10] == still[40] == pytest.approx(heldout_loss(before.trainer, data_folder), rel=1e-12)
    assert kept[40] != still[40]


def test_the_restart_ladders_shift_and_ramp_are_whole_windows_of_the_sampler():
    """The sampler draws a mixture window by window: English alone up to the shift, the ramp in steps after it."""
    window_at = [(SHIFT * ROWS + part * RAMP * ROWS // 4) for part in range(5)]
    assert SHIFT * ROWS % WINDOW == RAMP * ROWS % WINDOW == 0
    for ramped, shares in ((False, (0.7,) * 4), (True, (0.175, 0.175, 0.525, 0.525))):
        config = mixture(ramped)
        (_, english), (_, chinese) = config.mixture
        (_, english_before), (_, chinese_before) = config.mixture_before
        drawn = Mixture((english, chinese), (english_before, chinese_before), config.mixture_ramp, seed=0)
        component, _ = drawn.place(np.arange(window_at[-1]))
        assert not component[: SHIFT * ROWS].any()
        for (begin, end), share in zip(pairwise(window_at), shares, strict=True):
            assert component[begin:end].mean() == pytest.approx(share, abs=0.05)

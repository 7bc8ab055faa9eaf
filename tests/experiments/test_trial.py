"""Trials: the collapse that counts, the frontier, forks; a trial is the run that ``glm train`` makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.arm import Arm
from experiments.study import Outcome, Study, judged, run_study, values_of
from experiments.suites import SUITES
from experiments.suites.lead import PAST, WINDOW, alarms
from experiments.suites.lead_rank import rank_before
from experiments.trial import GRID, collapse_onset, configured, frontier, group_of, trial
from experiments.verdicts import Claim
from glm.cli import main as glm
from glm.train.replay_forks import Change
from glm.train.state_ring import StateRing
from stabilitylab.runs import load_run
from tests.glm.conftest import data_folder, text_files  # noqa: F401 - fixtures

SETTINGS = {
    "model.layers": "1",
    "model.hidden": "16",
    "model.heads": "2",
    "model.length": "32",
    "objective.pieces": "2",
    "batch.rows": "2",
    "steps": "8",
    "schedule.warmup": "2",
}


def falling(steps: int) -> np.ndarray:
    return 4 + 2 * np.exp(-np.arange(steps) / 20)


def test_a_collapse_is_the_excursion_that_lasts_to_the_end():
    loss = falling(100)
    assert collapse_onset(loss) is None
    loss[30:45] += 3  # recovers
    assert collapse_onset(loss) is None
    loss[80:] = 8.0
    assert collapse_onset(loss) == 80
    loss[80:] = np.nan
    assert collapse_onset(loss) == 80


def test_a_late_bump_is_no_collapse_unless_the_run_was_ended():
    loss = falling(60)
    loss[-4:] = 9.0
    assert collapse_onset(loss) is None
    loss[-10:] = np.nan
    assert collapse_onset(loss, ended=True) == 50


def test_single_overflows_are_none():
    loss = falling(80)
    loss[::7] = np.nan
    assert collapse_onset(loss) is None


@pytest.mark.parametrize("bears", [-99, 0, 3, len(GRID) - 1])
def test_the_frontier_is_the_last_rate_that_survives(bears):
    class Ran:
        def __init__(self, rate: float) -> None:
            self.survived = bears >= 0 and rate <= 2.0 ** GRID[bears]

    expected = GRID[bears] if bears >= 0 else GRID[0] - 0.5
    assert frontier(Ran) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("embedding.weight", "embedding"),
        ("positions", "embedding"),
        ("projection.weight", "projection"),
        ("embedding_norm.weight", "norm"),
        ("layers.0.attention.query_key_value.bias", "attention"),
        ("layers.3.attention.query_norm.weight", "norm"),
        ("layers.0.feed_forward.down.weight", "feed_forward"),
        ("layers.0.attention_norm.weight", "norm"),
        ("layers.0.feed_forward_norm.bias", "norm"),
        ("final_norm.weight", "norm"),
    ],
)
def test_groups(name, group):
    assert group_of(name) == group


def test_alarms_are_finite_and_rise_over_their_past():
    norm = np.ones(60)
    norm[[5, 30, 40]] = [9.0, 9.0, np.inf]
    assert np.flatnonzero(alarms(norm, 4.0)).tolist() == [30]


def test_a_trial_is_the_run_that_glm_train_makes(data_folder: Path, tmp_path: Path):  # noqa: F811
    flags = [word for flag, value in SETTINGS.items() for word in (f"--{flag}", value)]
    words = ["--device", "cpu", "--data", str(data_folder), "--out", str(tmp_path / "run"), *flags]
    assert glm(["train", "glm-tiny", *words]) == 0
    made = trial(configured("glm-tiny", SETTINGS, data=data_folder), data=data_folder)
    assert made.loss.tolist() == load_run(tmp_path / "run").series("train/-/loss").tolist()
    assert np.isfinite(made.heldout)
    squares = sum(values**2 for values in made.groups.values())
    np.testing.assert_allclose(np.sqrt(squares), made.norm, rtol=1e-6)


def test_forks_repeat_and_withhold(data_folder: Path):  # noqa: F811
    config, ring = configured("glm-tiny", SETTINGS, data=data_folder), StateRing(every=2, size=9)
    run = trial(config, data=data_folder, heldout=False, ring=ring)
    state = ring.newest_at(4)
    assert state is not None
    again = trial(config, data=data_folder, start=state, heldout=False)
    assert again.first == 4
    assert again.loss.tolist() == run.loss[4:].tolist()

    # The groups of a study are what the loop's own hold takes, moments and all.
    def hold(trainer):
        names = tuple(n for n in trainer.engine.tensors()[0] if group_of(n) == "embedding")
        Change(hold=names, hold_steps=3).apply(trainer)

    held = trial(config, data=data_folder, start=state, until=7, heldout=False, prepare=hold)
    weights = held.trainer.engine.tensors()[0]
    assert weights["embedding.weight"].equal(state.model["embedding.weight"])
    assert not weights["final_norm.weight"].equal(state.model["final_norm.weight"])
    moved = trial(config, data=data_folder, start=state, until=8, heldout=False, prepare=hold).trainer.engine
    assert not moved.tensors()[0]["embedding.weight"].equal(state.model["embedding.weight"])


def test_a_study_goes_on_where_it_was(data_folder: Path, tmp_path: Path):  # noqa: F811
    calls = []

    def measure(cell):
        calls.append((cell.arm.name, cell.seed))
        return {"value": cell.seed + (1.0 if cell.arm.name == "more" else 0.0) + 0.01 * len(calls)}

    study = Study(
        name="tried",
        question="?",
        arms=(Arm(name="less", summary=""), Arm(name="more", summary="")),
        claims=(Claim(text="more", metric="value", arm="more", baseline="less", direction="more"),),
        predictions=("it is",),
        outcomes={"value": Outcome(title="value", margin=0.1)},
        measure=measure,
        seeds=6,
        data=lambda folder: data_folder,
        settings=SETTINGS,
    )
    run_study(study, data=data_folder, out=tmp_path, seeds=2)
    with (tmp_path / "values.jsonl").open("a") as file:
        file.write('{"arm": "less", "se')  # a kill cut it short
    run_study(study, data=data_folder, out=tmp_path)
    assert calls == [(arm, seed) for seed in range(1, 7) for arm in ("less", "more")]
    assert {arm: set(found) for arm, found in values_of(tmp_path)["value"].items()} == {
        arm: set(range(1, 7)) for arm in ("less", "more")
    }
    assert judged(study, tmp_path)[0].judgement == "supported"


def test_every_study_names_what_it_judges():
    import importlib

    for module in SUITES.values():
        study = getattr(importlib.import_module(module), "STUDY", None)
        if study is None:
            continue
        arms = {arm.name for arm in study.arms}
        assert study.predictions
        for claim in study.claims:
            assert claim.metric in study.outcomes
            assert {claim.arm, claim.baseline} - {None} <= arms


def test_the_rise_before_a_collapse_has_its_rank_among_the_runs_windows():
    rng = np.random.default_rng(0)
    norm = rng.lognormal(0, 0.1, 200)
    norm[175] *= 3
    assert rank_before(norm, 180) == (0.5, 5)
    norm[60] *= 9  # a window among those before had more
    rank, lead = rank_before(norm, 180)
    ends = range(PAST + WINDOW, 180 - WINDOW + 1)
    above = sum(60 in range(end - WINDOW, end) for end in ends)
    assert lead == 5
    assert rank == pytest.approx(0.5 - above / len(ends))
    norm[164:180] = np.inf
    assert rank_before(norm, 180) is None


def test_the_rank_of_a_window_like_all_others_is_nothing_on_average():
    rng = np.random.default_rng(1)
    ranks = np.array([rank_before(rng.lognormal(0, 0.3, 120), 120)[0] for _ in range(100)])
    assert abs(ranks.mean()) < 4 * ranks.std() / 10
    assert np.abs(ranks).max() <= 0.5

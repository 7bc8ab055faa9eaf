"""A lost run ends early and counts as complete; neither a spike that recovers nor a patience of 0 ends a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from glm.cli import main
from glm.train.lost_run import LostRule
from stabilitylab.runs import load_run


@pytest.mark.parametrize(
    ("losses", "patience", "ends"),
    [
        ([6.0, 5.0, *[8.0] * 3], 3, True),
        ([6.0, 5.0, 8.0, 8.0, 6.5, 8.0, 8.0], 3, False),
        ([6.0, *[math.nan] * 3], 3, True),
        ([6.0, *[6.9] * 50], 3, False),
        ([6.0, *[math.inf] * 50], 0, False),
    ],
)
def test_lost_is_out_of_course_for_as_long_as_the_patience(
    losses: list[float], patience: int, ends: bool
) -> None:
    rule = LostRule(patience)
    assert any(rule.update(loss) for loss in losses) is ends


def test_a_loss_scale_that_is_stuck_is_lost() -> None:
    rule = LostRule(2)
    assert [rule.update(5.0, stuck=stuck) for stuck in (False, True, False, True, True)] == [False] * 4 + [
        True
    ]


def test_a_lost_run_ends_early_and_is_complete(data_folder: Path, tmp_path: Path) -> None:
    flags = "--model.layers 1 --model.hidden 16 --model.heads 2 --model.length 32 --batch.rows 2 --monitor.every 0"
    rate = "--schedule.peak 1e4 --schedule.warmup 1 --steps 40 --stop-when-lost 3"
    words = ["train", "glm-proxy", "--data", str(data_folder), "--out", str(tmp_path / "run")]
    assert main([*words, *flags.split(), *rate.split()]) == 0
    run = load_run(tmp_path / "run")
    assert len(run.series("train/-/loss")) < 20
    assert run.events[-1].kind == "run-end" or any(event.kind == "run-end" for event in run.events)
    assert any(event.data.get("lost") for event in run.events if event.kind == "run-end")

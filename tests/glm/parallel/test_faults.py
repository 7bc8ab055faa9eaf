"""Training whose processes die, hang, run out of disk or find a damaged checkpoint ends where the undisturbed run does.

``experiments.benchmarks.faults`` disturbs real processes under torchrun; it says what each fault is and what should follow.
"""

from __future__ import annotations

import random
import resource

import pytest

from experiments.benchmarks._launched import Launched, Shape
from experiments.benchmarks.faults import MIX, STEPS_EACH, compare
from stabilitylab.runs import load_run
from tests.patience import PATIENCE

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed


def test_a_killed_rank_and_a_full_disk_lose_nothing_and_count_nothing_twice(data_folder, tmp_path):
    shape = Shape(tensor=1, pipeline=1, data=2, steps=40, timeout=PATIENCE)
    outcome = compare(data_folder, tmp_path, shape, ["full", "one"], seed=random.randrange(2**31))
    assert all(outcome.verdicts.values()), outcome
    assert [one.recovery for one in outcome.injuries] == ["went on", "restart"]


def test_a_last_checkpoint_that_cannot_be_written_is_one_line_of_all_and_the_run_can_go_on(
    data_folder, tmp_path
):
    """The disk of one rank is full to the end."""
    with Launched(
        data_folder, tmp_path / "run", Shape(tensor=1, pipeline=1, data=2, steps=40, timeout=PATIENCE)
    ) as run:
        run.launch()
        run.wait_for(lambda line: line.step == 4)
        resource.prlimit(run.ranks()[1], resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        assert run.finish() != 0
        (refusal,) = [line.text for line in run.lines if line.text.startswith("error: ")]
        assert "File too large while writing" in refusal
        assert "-00001.safetensors: free some space" in refusal
        # On a busy machine torchrun ends the other ranks while they are still leaving by themselves.
        assert exit_codes(run) - {"-15"} == {"2"}
        # torchrun has a traceback of its own.
        assert not any("/glm/" in line.text for line in run.lines if line.text.lstrip().startswith("File "))
        newest = run.newest()
        assert newest is not None
        assert newest[0] in range(2, 40, 2)
        assert not list((run.out / "checkpoints").glob("*.partial"))
        run.launch()
        assert run.finish() == 0, run.text()
        assert run.newest()[0] == 40
    losses = load_run(run.out).series("train/-/loss")
    assert list(losses.index) == list(range(40))


def test_wrong_input_is_one_line_under_torchrun_too(data_folder, tmp_path):
    """``test_refusals.py`` has the other kinds, without a launcher."""
    with Launched(data_folder, tmp_path / "run", Shape(tensor=1, pipeline=1, data=2)) as run:
        run.launch("--parallel.data", "3")
        assert run.finish() != 0
        refusals = [line.text for line in run.lines if line.text.startswith("error: ")]
    assert len(refusals) == 1, run.text()
    assert "is 3, but 2 processes were started" in refusals[0]
    assert exit_codes(run) == {"2"}
    assert not (tmp_path / "run" / "config.json").exists()


def exit_codes(run: Launched) -> set[str]:
    """The ranks' exit codes, as torchrun reports them."""
    told = [line.text.split(":") for line in run.lines if line.text.strip().startswith("exitcode")]
    return {words[1].split()[0] for words in told}


@pytest.mark.slow
def test_twenty_faults_in_one_run(data_folder, tmp_path):
    """Faults of every kind, on 2 x 2 x 1."""
    faults = random.Random(0).sample(MIX, len(MIX))
    shape = Shape(steps=STEPS_EACH * (len(faults) + 1))
    outcome = compare(data_folder, tmp_path, shape, faults, seed=0)
    assert all(outcome.verdicts.values()), outcome

"""A suite's runs are those of ``glm train`` alone, whatever happens to their processes; the runner reports a failure once."""

from __future__ import annotations

import dataclasses
import os
import signal
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from pathlib import Path

import pytest

from experiments.arm import Arm, Suite
from experiments.execution import executors
from experiments.execution.runner import jobs_of, run_suite
from glm.cli import main
from stabilitylab.errors import InputError

TINY = Suite(
    name="tiny",
    question="?",
    preset="glm-proxy",
    steps=4,
    seeds=(0,),
    settings={
        "model.layers": "1",
        "model.hidden": "16",
        "model.heads": "2",
        "model.length": "64",
        "batch.rows": "2",
        "monitor.every": "2",
        "monitor.no-tensorboard": "",
    },
    arms=(
        Arm(name="plain", summary=""),
        Arm(name="untied", summary="", settings={"model.embedding.no-tied": ""}),
    ),
    claims=(),
    data=lambda folder: folder,
)


class Here(Executor):
    """Runs in this process; breaks at each of the first ``breaks`` submissions."""

    def __init__(self, breaks: list[int]) -> None:
        self.breaks = breaks

    def submit(self, call, /, *args, **kwargs):
        future: Future[int] = Future()
        if self.breaks[0] > 0:
            self.breaks[0] -= 1
            future.set_exception(BrokenExecutor("killed"))
        else:
            future.set_result(call(*args, **kwargs))
        return future


def weights(folder: Path) -> bytes:
    (newest,) = sorted((folder / "checkpoints").glob("step-*"))[-1:]
    return (newest / "model.safetensors").read_bytes()


def test_a_workers_runs_are_those_of_the_command_alone(data_folder: Path, tmp_path: Path) -> None:
    run_suite(TINY, data=data_folder, out=tmp_path / "runs", parallel=1)
    for job in jobs_of(TINY, tmp_path / "runs"):
        alone = tmp_path / f"alone-{job.arm.name}"
        assert main(TINY.command(job.arm, job.seed, data=data_folder, out=alone)) == 0
        assert job.is_complete()
        assert weights(job.out) == weights(alone)


def test_runs_go_on_in_another_executor_when_one_breaks(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaks = [2]
    run_suite(TINY, data=data_folder, out=tmp_path, executor=lambda: Here(breaks))
    assert all(job.is_complete() for job in jobs_of(TINY, tmp_path))
    said = capsys.readouterr().err
    assert "begun again" in said
    assert "run 2/2  untied, seed 0: complete" in said
    # Given again, nothing is left to do.
    run_suite(TINY, data=data_folder, out=tmp_path, executor=lambda: pytest.fail("nothing to run"))


def test_workers_live_from_one_group_of_seeds_to_the_next(data_folder: Path, tmp_path: Path) -> None:
    opened: list[Here] = []

    def opens() -> Here:
        opened.append(Here([1 if len(opened) == 1 else 0]))
        return opened[-1]

    first = dataclasses.replace(TINY, arms=TINY.arms[:1])
    with executors.Kept(opens, 1) as kept:
        for seeds in ((0,), (0, 1)):
            run_suite(dataclasses.replace(first, seeds=seeds), data=data_folder, out=tmp_path, executor=kept)
        assert len(opened) == 1
        # One that broke is not used again.
        opened[0].breaks[0] = 1
        run_suite(dataclasses.replace(first, seeds=(2,)), data=data_folder, out=tmp_path, executor=kept)
        assert len(opened) == 3


def test_a_run_that_kills_its_process_three_times_is_given_up(data_folder: Path, tmp_path: Path) -> None:
    suite = dataclasses.replace(TINY, arms=TINY.arms[:1])
    with pytest.raises(InputError, match=r"1 of the suite's runs failed: plain, seed 0"):
        run_suite(suite, data=data_folder, out=tmp_path, executor=lambda: Here([1]))


def test_a_killed_worker_breaks_the_local_executor_and_no_more() -> None:
    with executors.local(1) as pool:
        assert isinstance(pool, ProcessPoolExecutor)
        assert pool.submit(os.getenv, "OMP_NUM_THREADS").result() == "1"
        with pytest.raises(BrokenExecutor):
            pool.submit(os.kill, pool.submit(os.getpid).result(), signal.SIGKILL).result()


def test_a_dask_clusters_runs_are_those_of_the_command_alone(data_folder: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    suite = dataclasses.replace(TINY, arms=TINY.arms[:1])
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as cluster:
        run_suite(
            suite, data=data_folder, out=tmp_path / "runs", executor=f"dask:{cluster.scheduler_address}"
        )
    (job,) = jobs_of(suite, tmp_path / "runs")
    assert main(suite.command(job.arm, 0, data=data_folder, out=tmp_path / "alone")) == 0
    assert weights(job.out) == weights(tmp_path / "alone")


def test_another_number_of_steps_is_not_passed_over(tmp_path: Path) -> None:
    (job, _) = jobs_of(TINY, tmp_path)
    job.out.mkdir()
    (job.out / "config.json").write_text('{"steps": 4}')
    with pytest.raises(
        InputError, match=r"holds runs of 4 steps \(plain, seed 0\), asked for are 9: give another --out"
    ):
        run_suite(TINY, data=tmp_path, out=tmp_path, steps=9)


def test_each_cause_is_told_once(tmp_path: Path) -> None:
    suite = dataclasses.replace(TINY, seeds=(0, 1), arms=TINY.arms[:1])
    with pytest.raises(InputError) as caught:
        run_suite(suite, data=tmp_path / "nowhere", out=tmp_path / "runs", executor=lambda: Here([0]))
    message = str(caught.value)
    assert message.startswith("2 of the suite's runs failed: plain, seed 0, plain, seed 1: error: ")
    assert message.count("nowhere") == 1
    assert "\n" not in message

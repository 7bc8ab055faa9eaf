"""Training over processes that die, hang or find a damaged checkpoint ends where the undisturbed run does.

Real processes under torchrun, which starts all again when one is gone: ``--resume`` continues from the newest whole checkpoint, so
steps made since are made again, with the same numbers.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from glm.train import checkpoint as checkpoints
from stabilitylab.report import load_run

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed

STEPS = 12
# Of the long test: what happens, and to how many processes.
FAULTS = ["one", "all", "hang", "one", "launcher", "damage", "one", "missing", "all", "writing"]
AXES = {"parallel_tensor": 2, "parallel_pipeline": 2}
FLAGS = {
    "model.layers": 2,
    "model.hidden": 32,
    "model.heads": 2,
    "model.length": 64,
    "batch.rows": 4,
    "batch.micro-rows": 1,
    "precision": "fp16",
    "checkpoint.every": 2,
    "checkpoint.keep": 3,
    "monitor.every": 4,
}


def flags(**more: object) -> list[str]:
    named = {**FLAGS, **{name.replace("_", ".", 1): value for name, value in more.items()}}
    return [word for name, value in named.items() for word in (f"--{name}", str(value))]


def launch(
    data: Path, out: Path, ranks: int, *, restarts: int = 0, steps: int = STEPS, **more: object
) -> subprocess.Popen[str]:
    """``glm train`` under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher += ["--max-restarts", str(restarts), "--monitor-interval", "0.2"]
    train = [
        "-m",
        "glm",
        "train",
        "glm-tiny",
        "--data",
        str(data),
        "--out",
        str(out),
        "--steps",
        str(steps),
        "--resume",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *train, "--monitor.no-tensorboard", *flags(**more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 240) -> str:
    """What it said. Ends its whole session if it does not end by itself."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        pytest.fail(f"hung: {said[-3000:]}")
    return said


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process numbers of the ranks, the first first."""
    found = []
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
        if "glm" in words and ranks:
            found.append((ranks[0], int(child)))
    return [child for _, child in sorted(found)]


def wait_for(out: Path, step: int, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until there is a checkpoint of ``step`` or a later one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        steps = [number for number, _ in checkpoints.list_checkpoints(out / "checkpoints")]
        if steps and steps[-1] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of step {step}: {finish(process, 5)[-3000:]}")


def curve(out: Path) -> list[float]:
    """The losses of the history that stands."""
    losses = load_run(out).series("train/-/loss")
    assert list(losses.index) == list(range(len(losses)))
    return losses.tolist()


def same_weights(one: Path, other: Path) -> bool:
    a, b = (checkpoints.load_newest(path / "checkpoints")[0] for path in (one, other))
    assert (a.step, a.state["samples"], a.state["engine"]) == (b.step, b.state["samples"], b.state["engine"])
    pairs = [(a.model, b.model), (a.optimizer, b.optimizer)]
    return all(torch.equal(x[name], y[name]) for x, y in pairs for name in x)


def test_a_killed_rank_is_started_again_and_nothing_is_lost_or_counted_twice(data_folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = launch(data_folder, whole, 2, parallel_data=2)
    said = finish(undisturbed)
    assert undisturbed.returncode == 0, said
    process = launch(data_folder, killed, 2, restarts=1, parallel_data=2)
    wait_for(killed, 4, process)
    os.kill(workers(process)[random.randrange(2)], signal.SIGKILL)
    said = finish(process)
    assert process.returncode == 0, said
    assert curve(killed) == curve(whole)
    assert same_weights(killed, whole)


@pytest.mark.parametrize(
    ("axes", "named"),
    [
        ({"parallel_data": 3}, "is 3, but 2 processes were started"),
        ({"parallel_tensor": 2, "model_heads": 1}, "does not divide model.heads 1"),
    ],
)
def test_wrong_input_is_one_line_and_ends_all_ranks_with_2(data_folder, tmp_path, axes, named):
    process = launch(data_folder, tmp_path / "run", 2, **axes)
    said = finish(process)
    refusals = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(refusals) == 1, said
    assert named in refusals[0]
    codes = [
        line.split(":")[1].split()[0] for line in said.splitlines() if line.strip().startswith("exitcode")
    ]
    assert set(codes) == {"2"}, said
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_many_faults_in_one_run(data_folder, tmp_path):
    """Kills of one rank, of all ranks and of the launcher, a hung rank, a damaged and a missing checkpoint file: 2 x 2 x 1."""
    axes, ranks_started = (
        {"parallel_timeout": 20, "steps": 4 + 5 * len(FAULTS), **AXES},
        math.prod(AXES.values()),
    )
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    undisturbed = launch(data_folder, whole, ranks_started, **axes)
    said = finish(undisturbed, 600)
    assert undisturbed.returncode == 0, said
    chance = random.Random(0)
    process = launch(data_folder, hurt, ranks_started, restarts=len(FAULTS), **axes)
    told = ""
    for number, fault in enumerate(FAULTS):
        wait_for(hurt, 4 + 4 * number, process, 300)
        ranks = workers(process)
        if fault in ("one", "hang"):
            os.kill(chance.choice(ranks), signal.SIGSTOP if fault == "hang" else signal.SIGKILL)
        elif fault == "all":
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
        elif fault == "writing":
            until = time.monotonic() + 60
            while not list((hurt / "checkpoints").glob("*.partial")) and time.monotonic() < until:
                time.sleep(0.001)
            os.kill(chance.choice(ranks), signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGKILL)
            for rank in ranks:
                if Path(f"/proc/{rank}").exists():
                    os.kill(rank, signal.SIGKILL)
            told += process.communicate()[0]
            _, newest = checkpoints.list_checkpoints(hurt / "checkpoints")[-1]
            file = next(newest.glob("model-00001*"))
            if fault == "damage":
                content = bytearray(file.read_bytes())
                content[-1] ^= 1
                file.write_bytes(content)
            elif fault == "missing":
                file.unlink()
            process = launch(data_folder, hurt, ranks_started, restarts=len(FAULTS), **axes)
    said = told + finish(process, 600)
    assert process.returncode == 0, said
    assert curve(hurt) == curve(whole)
    assert same_weights(hurt, whole)
    events = [json.loads(line) for line in (hurt / "events.jsonl").read_text().splitlines()]
    problems = [event["data"]["problem"] for event in events if event["kind"] == "recovered"]
    for fault, said in (("damage", "does not match its checksum"), ("missing", "is missing")):
        assert any(said in problem for problem in problems) == (fault in FAULTS)

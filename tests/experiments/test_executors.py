"""Executors with the real libraries: a task's result, its error, its death; what Slurm is handed."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import stat
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest

from experiments.execution import executors
from experiments.execution.cells import through
from experiments.execution.runner import jobs_of, run_suite
from experiments.study import run_study, values_of
from glm.cli import main
from stabilitylab.errors import InputError
from tests.experiments.test_runner import TINY, weights
from tests.patience import PATIENCE, wait_until

# Slurm's commands as far as submitit uses them: a job is run at once and in the background, its state is whether it has ended. As
# Slurm does, sbatch keeps the script as it was: submitit renames it right after.
SLURM = {
    "sbatch": """#!/bin/bash
cp "${!#}" $FAKE/submitted.sh
export SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here
(bash $FAKE/submitted.sh >$FAKE/said 2>&1; echo done >$FAKE/done) >/dev/null 2>&1 &
echo Submitted batch job 7
""",
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do
  if [[ $1 == --output || $1 == --error || $1 == --signal ]]; then shift; fi
  shift
done
exec "$@"
""",
    "sacct": """#!/bin/bash
echo "JobID|State|NodeList"
if [[ -e $FAKE/done ]]; then echo "7|COMPLETED|here"; else echo "7|RUNNING|here"; fi
""",
    "scancel": "#!/bin/bash\n",
}


def kill_once(mark: Path) -> str:
    if not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return "lived"


def check(executor, tmp_path: Path) -> None:
    """What the runner needs from an executor: results, errors as they are, and deaths reported as deaths."""
    assert executor.submit(divmod, 7, 2).result(timeout=PATIENCE) == (3, 1)
    assert "division" in str(executor.submit(divmod, 1, 0).exception(timeout=PATIENCE))
    killed = executor.submit(kill_once, tmp_path / "mark")
    assert isinstance(killed.exception(timeout=PATIENCE), BrokenExecutor)


def test_a_job_of_submitit(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    submitit.core.core.Job._results_timeout_s = 1
    executor = executors.Submitit(tmp_path / "jobs", {"timeout_min": 5}, cluster="local")
    check(executor, tmp_path)
    executor.shutdown()


def test_what_slurm_is_handed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in SLURM.items():
        (commands / name).write_text(text)
        (commands / name).chmod((commands / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    opened, most = executors.chosen("slurm:timeout_min=30,slurm_partition=cpu,mem_gb=4", 3, tmp_path)
    assert most == 3
    executor = opened()
    assert executor.submit(divmod, 7, 2).result(timeout=PATIENCE) == (3, 1)
    executor.shutdown()
    with pytest.raises(InputError, match="tiem_min"):
        executors.chosen("slurm:tiem_min=30", 3, tmp_path)[0]()
    script = (tmp_path / "submitted.sh").read_text()
    for line in ("--time=30", "--partition=cpu", "--mem=4GB", "--cpus-per-task=1", "--job-name=stabilitylab"):
        assert f"#SBATCH {line}" in script


def test_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    executor = executors.Ray("")
    check(executor, tmp_path)
    executor.shutdown()


def test_a_ray_cluster_where_nobody_listens_is_told_of_at_once() -> None:
    with socket.socket() as server:
        # A bound socket that does not listen refuses calls and keeps its port from everybody else.
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999"):
            with pytest.raises(InputError, match=f"no Ray cluster answers at {address}"):
                executors.knock(address)
        server.listen()
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto"):
            executors.knock(address)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("slrum", "choose local"),
        ("local:3", "choose local"),
        ("dask", "choose local"),
        ("slurm:cpu", "KEY=VALUE"),
    ],
)
def test_executors_that_are_none_are_told_of(name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        executors.chosen(name, None, tmp_path)[0]()


STUDY = """
import os, signal
from pathlib import Path
from experiments.arm import Arm
from experiments.study import Outcome, Study

def measure(cell):
    mark = Path(__file__).with_suffix(".mark")
    if cell.seed == 2 and cell.arm.name == "b" and not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return {"x": cell.seed + (10 if cell.arm.name == "b" else 0), "process": os.getpid()}

class Light(Study):
    def cell(self, arm, seed, data):
        from experiments.study import Cell
        return Cell(arm=arm, seed=seed, config=None, data=data)

STUDY = Light(
    name="light", question="?", arms=(Arm(name="a", summary=""), Arm(name="b", summary="")), claims=(), predictions=(),
    outcomes={"x": Outcome(title="x", margin=1.0)}, measure=measure, seeds=3, data=Path,
)
"""


def test_a_study_through_processes_one_of_which_is_killed(tmp_path: Path) -> None:
    from experiments.lookup import load

    file = tmp_path / "light.py"
    file.write_text(STUDY)
    study = load(str(file))
    run_study(
        study,  # type: ignore[arg-type]
        data=tmp_path,
        out=tmp_path / "out",
        through=through(lambda: executors.local(1), 2, asked=str(file), data=tmp_path),
    )
    found = values_of(tmp_path / "out")
    assert found["x"] == {"a": {1: 1, 2: 2, 3: 3}, "b": {1: 11, 2: 12, 3: 13}}
    assert (tmp_path / "light.mark").exists()
    assert os.getpid() not in found["process"]["a"].values()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["submitit", "ray"])
def test_a_suites_runs_are_those_of_the_command_alone(kind: str, data_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip(kind)
    suite = dataclasses.replace(TINY, arms=TINY.arms[:1])

    def opened():
        if kind == "ray":
            return executors.Ray("")
        return executors.Submitit(tmp_path / "jobs", {}, cluster="local")

    run_suite(suite, data=data_folder, out=tmp_path / "runs", executor=opened)
    (job,) = jobs_of(suite, tmp_path / "runs")
    assert main(suite.command(job.arm, 0, data=data_folder, out=tmp_path / "alone")) == 0
    assert weights(job.out) == weights(tmp_path / "alone")


PARENT = """
import dataclasses, sys
from pathlib import Path
from experiments.execution.runner import run_suite
from tests.experiments.test_executors import LONGER

if __name__ == "__main__":
    run_suite(LONGER, data=Path(sys.argv[1]), out=Path(sys.argv[2]), parallel=1)
"""
LONGER = dataclasses.replace(
    TINY, steps=60, arms=TINY.arms[:1], settings={**TINY.settings, "checkpoint.every": "5"}
)


def children(process: int) -> list[int]:
    """Workers of a process."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(one) for one in found if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_kills_of_a_worker_and_of_the_parent_leave_the_same_bits(data_folder: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, str(script), str(data_folder), str(tmp_path / "runs")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
    )
    (job,) = jobs_of(LONGER, tmp_path / "runs")

    def states() -> list[str]:
        return sorted(path.name for path in (job.out / "checkpoints").glob("step-*"))

    wait_until(states)
    first = wait_until(lambda: children(parent.pid))[0]
    os.kill(first, signal.SIGKILL)
    second = wait_until(lambda: [one for one in children(parent.pid) if one != first])[0]
    reached = states()
    wait_until(lambda: states() > reached or job.is_complete())
    parent.send_signal(signal.SIGKILL)
    _, said = parent.communicate()
    assert "begun again" in said
    wait_until(lambda: not Path(f"/proc/{second}").exists())
    assert not job.is_complete()
    run_suite(LONGER, data=data_folder, out=tmp_path / "runs", parallel=1)
    assert job.is_complete()
    assert main(LONGER.command(job.arm, 0, data=data_folder, out=tmp_path / "alone")) == 0
    assert weights(job.out) == weights(tmp_path / "alone")

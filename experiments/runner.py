"""Run a suite: every arm with every seed, over the cores, resumable run by run.

Each run is one ``glm train`` process with one thread; as many go at once as there are cores (``jobs``). A run that is
complete is left alone, one that was interrupted is resumed from its checkpoint, so the same command can be given again
after anything. A run whose training fails does not stop the others: it is named at the end, with its last line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.arm import Arm, Suite
from stabilitylab.errors import InputError
from stabilitylab.runs.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a suite."""

    arm: Arm
    seed: int
    out: Path

    @property
    def name(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.out.with_name(self.out.name + ".log")

    def is_complete(self) -> bool:
        return any(event.kind == "run-end" for event in RunFolder(self.out).read_events())


def jobs_of(suite: Suite, out: Path) -> list[Job]:
    """Every arm with every seed; a seed's arms lie side by side in time, so that a cut-off suite compares what it has."""
    return [
        Job(arm=arm, seed=seed, out=out / f"{arm.name}-seed{seed}")
        for seed in suite.seeds
        for arm in suite.arms
    ]


def run_suite(suite: Suite, *, data: Path, out: Path, parallel: int, steps: int | None = None) -> None:
    """Run what is not complete yet.

    Raises:
        InputError: a run failed; the others were finished first.
    """
    out.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs_of(suite, out) if not job.is_complete()]
    commands = {
        job.name: suite.command(job.arm, job.seed, data=data, out=job.out, steps=steps) for job in waiting
    }
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    failed: list[Job] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            total = len(jobs_of(suite, out))
            overall = progress.add_task(
                f"[bold]{suite.name}", total=total, completed=total - len(waiting), said=f"{total} runs"
            )
            bars = {}
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = waiting.pop(0)
                    running[job.name] = (job, _start(job, commands[job.name]))
                    bars[job.name] = progress.add_task(job.name, total=steps or suite.steps, said="starting")
                time.sleep(0.5)
                for name, (job, process) in list(running.items()):
                    said = _last_line(job.log)
                    progress.update(bars[name], said=said, completed=_step_in(said))
                    if process.poll() is None:
                        continue
                    del running[name]
                    progress.remove_task(bars[name])
                    progress.advance(overall)
                    if process.returncode:
                        failed.append(job)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    if failed:
        raise InputError(
            f"{len(failed)} of the suite's runs failed: {_causes(failed)}; mend the cause and give the command again"
        )


def _causes(failed: Sequence[Job]) -> str:
    """Each cause once, with the runs that it ended and the log of the first."""
    by_cause: dict[str, list[Job]] = {}
    for job in sorted(failed, key=lambda job: job.name):
        by_cause.setdefault(_last_line(job.log), []).append(job)
    return "; ".join(
        f"{', '.join(job.name for job in jobs)}: {cause} (see {jobs[0].log})"
        for cause, jobs in by_cause.items()
    )


def _start(job: Job, command: Sequence[str]) -> subprocess.Popen[bytes]:
    resume = ["--resume"] if RunFolder(job.out).config.exists() else []
    # One thread a run: two small runs side by side use two cores better than one run with two threads.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with job.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "glm", *command, *resume],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _last_line(log: Path) -> str:
    """The last complete line of a log that grows; "" before there is one."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _step_in(line: str) -> int | None:
    """The 120 of ``step 120/300 ...``."""
    words = line.split()
    if len(words) < 2 or words[0] != "step":
        return None
    number = words[1].partition("/")[0]
    return int(number) if number.isdigit() else None

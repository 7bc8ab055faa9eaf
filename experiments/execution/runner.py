"""Runs a suite: every arm with every seed, through an executor, resumable run by run.

The runner leaves a complete run alone and resumes an interrupted one from its checkpoint, so after any break you give the same
command again. Where processes of the executor die (killed, out of memory) it opens another and their runs go on; it gives up a run
whose process died three times. A run whose training fails does not stop the others: the command names it at the end, with its last
line. On a terminal bars show the progress; elsewhere there is one line for each run that ends.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from experiments.arm import Arm, Suite
from experiments.execution import worker
from experiments.execution.executors import Kept, chosen
from stabilitylab.errors import InputError
from stabilitylab.runs import Run
from stabilitylab.runs.folder import RunFolder

SECONDS_BETWEEN_LOOKS = 0.5
DEATHS = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a suite."""

    arm: Arm
    seed: int
    out: Path
    rate: float | None = None

    @property
    def name(self) -> str:
        at = "" if self.rate is None else f", rate 2^{self.rate:g}"
        return f"{self.arm.name}{at}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.out.with_name(self.out.name + ".log")

    def is_complete(self) -> bool:
        return any(event.kind == "run-end" for event in RunFolder(self.out).read_events())

    def begun_with(self) -> int | None:
        """The planned steps of a run begun earlier; None: there is none."""
        if not RunFolder(self.out).config.exists():
            return None
        return int(Run(RunFolder(self.out)).config.get("steps", 0)) or None


def jobs_of(suite: Suite, out: Path) -> list[Job]:
    """Every arm with every seed; a seed's arms run side by side, so that an interrupted suite can compare what it has."""
    return [
        Job(arm=arm, seed=seed, rate=rate, out=out / f"{arm.name}{_at(rate)}-seed{seed}")
        for seed in suite.seeds
        for rate in suite.rates or (None,)
        for arm in suite.arms
    ]


def _at(rate: float | None) -> str:
    return "" if rate is None else f"-rate{2.0**rate:.3g}"


def run_suite(
    suite: Suite,
    *,
    data: Path,
    out: Path,
    parallel: int | None = None,
    steps: int | None = None,
    executor: str | Callable[[], Executor] | Kept = "local",
) -> None:
    """Run the incomplete runs.

    Args:
        suite: the suite.
        data: folder made by ``glm shards``.
        out: where the runs go.
        parallel: runs at a time; None: one per core, or the executor's number.
        steps: updates per run instead of the suite's own.
        executor: a name of ``experiments.execution.executors``, a function that opens one, or a kept one.

    Raises:
        InputError: the folder holds runs of another length, which the suite would compare as if of this one. Or a run failed, after
            the others finished.
    """
    out.mkdir(parents=True, exist_ok=True)
    data, out = data.resolve(), out.resolve()
    jobs = jobs_of(suite, out)
    asked = suite.steps if steps is None else steps
    others = [(job, held) for job in jobs if (held := job.begun_with()) not in (None, asked)]
    if others:
        raise InputError(
            f"{out} holds runs of {others[0][1]} steps ({others[0][0].name}), asked for are {asked}: give another --out, or "
            f"--steps {others[0][1]}"
        )
    waiting = [job for job in jobs if not job.is_complete()]
    commands = {
        job.name: suite.command(job.arm, job.seed, data=data, out=job.out, steps=steps, rate=job.rate)
        for job in waiting
    }
    failed: list[Job] = []
    deaths: Counter[str] = Counter()
    with ExitStack() as ends:
        if isinstance(executor, Kept):
            kept = executor
        else:
            opens = (
                chosen(executor, parallel, out) if isinstance(executor, str) else (executor, parallel or 1)
            )
            kept = ends.enter_context(Kept(*opens))
        shown = ends.enter_context(_Shown(suite, total=len(jobs), done=len(jobs) - len(waiting), steps=asked))
        while waiting:
            waiting, broken = _through(kept, waiting, commands, failed, shown)
            for job in broken:
                deaths[job.name] += 1
            failed += [job for job in broken if deaths[job.name] >= DEATHS]
            waiting = [job for job in (*broken, *waiting) if deaths[job.name] < DEATHS]
    if failed:
        raise InputError(
            f"{len(failed)} of the suite's runs failed: {_causes(failed)}; fix the cause and run the command again"
        )


def _through(
    kept: Kept,
    waiting: list[Job],
    commands: Mapping[str, Sequence[str]],
    failed: list[Job],
    shown: _Shown,
) -> tuple[list[Job], list[Job]]:
    """Run through one executor until all is done or it breaks. Returns the runs not begun, and those during which it broke."""
    waiting, running, broken = list(waiting), dict[Future[int], Job](), list[Job]()
    executor = kept.opened()
    try:
        while (waiting and not broken) or running:
            while waiting and not broken and len(running) < kept.most:
                job = waiting.pop(0)
                try:
                    running[executor.submit(worker.train, _words(job, commands[job.name]), job.log)] = job
                except BrokenExecutor:
                    waiting.insert(0, job)
                    broken += [job] if not running else []
                    break
                shown.begins(job)
            done, _ = wait(running, timeout=SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenExecutor):
                    broken.append(job)
                    shown.ends(job, None)
                    continue
                if error is not None:
                    with job.log.open("a", encoding="utf-8") as log:
                        log.write(f"error: {type(error).__name__}: {error}\n")
                if error is not None or future.result():
                    failed.append(job)
                shown.ends(job, job not in failed)
            shown.look(running.values())
    finally:
        if running or broken:
            kept.let_go(wait=not running)
    return [job for job in waiting if job not in broken], broken


def _words(job: Job, command: Sequence[str]) -> list[str]:
    return [*command, *(["--resume"] if RunFolder(job.out).config.exists() else [])]


class _Shown:
    """Shows bars on a terminal, elsewhere one line for each run that ends."""

    def __init__(self, suite: Suite, *, total: int, done: int, steps: int) -> None:
        self._console = Console(stderr=True)
        self._total, self._done, self._steps = total, done, steps
        self._began, self._before = time.monotonic(), done
        self._bars: dict[str, TaskID] = {}
        # On a narrow terminal a run's status gives way; its name does not.
        columns = (
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[said]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
        )
        self._progress = Progress(
            *columns, console=self._console, disable=not self._console.is_terminal, expand=True
        )
        self._overall = self._progress.add_task(
            f"[bold]{suite.name}", total=total, completed=done, said=f"{done} of {total} runs"
        )

    def __enter__(self) -> _Shown:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begins(self, job: Job) -> None:
        if len(self._bars) < 32:  # a cluster takes hundreds at once
            self._bars[job.name] = self._progress.add_task(job.name, total=self._steps, said="starting")

    def look(self, running: Iterable[Job]) -> None:
        if not self._console.is_terminal:
            return
        for job in running:
            if job.name in self._bars:
                said = worker.last_line(job.log)
                self._progress.update(self._bars[job.name], said=said, completed=_step_in(said))

    def ends(self, job: Job, well: bool | None) -> None:
        """``well`` None: its process died, and the run will begin again."""
        if job.name in self._bars:
            self._progress.remove_task(self._bars.pop(job.name))
        if well is not None:
            self._done += 1
        each = (time.monotonic() - self._began) / max(1, self._done - self._before)
        left = f"{each * (self._total - self._done):,.0f} s left"
        self._progress.update(
            self._overall, completed=self._done, said=f"{self._done} of {self._total} runs, {left}"
        )
        if not self._console.is_terminal:
            how = {True: "complete", False: "failed", None: "its process died, begun again"}[well]
            self._console.print(
                f"run {self._done}/{self._total}  {job.name}: {how}  {left}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def _causes(failed: Sequence[Job]) -> str:
    """Each cause once, with its runs and the log of the first."""
    by_cause: dict[str, list[Job]] = {}
    for job in sorted(failed, key=lambda job: job.name):
        by_cause.setdefault(worker.last_line(job.log), []).append(job)
    return "; ".join(
        f"{', '.join(job.name for job in jobs)}: {cause} (see {jobs[0].log})"
        for cause, jobs in by_cause.items()
    )


def _step_in(line: str) -> int | None:
    """The 120 of ``step 120/300 ...``."""
    words = line.split()
    if len(words) < 2 or words[0] != "step":
        return None
    number = words[1].partition("/")[0]
    return int(number) if number.isdigit() else None

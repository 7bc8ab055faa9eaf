"""Runs per hour of a small model: long-lived workers of this build, alternated with another build's processes.

A run is 4 layers of 64, rows of 128, 8 rows, 200 steps, monitored every tenth with TensorBoard. A round has two of each, side by
side:

    former    `python -m glm train` in the tree given by --former, one process a run, one thread
    now       `glm train` in workers of this build that live from round to round (``experiments.execution.worker``)
    off       the same without telemetry and TensorBoard
    plain     a loop of torch.nn modules without anything (``_plain_loop.py``), in such a worker

The benchmark compares processor seconds (user and system, with children), which hardly depend on other users of the machine. Wall
seconds are those of a round's two runs together, halved. It prints a worker's start apart, and counts it in `with starts`.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.benchmarks._plain_loop import plain_run
from experiments.data import build
from experiments.execution import executors, worker
from stabilitylab.command_line import parse

SIDE_BY_SIDE = 2
SHAPE = (
    *("--model.layers", "4", "--model.hidden", "64", "--model.heads", "4", "--model.length", "128"),
    *("--batch.rows", "8", "--monitor.every", "10"),
)
OFF = ("--monitor.every", "0", "--monitor.gradients-every", "0", "--monitor.no-tensorboard")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Time runs.

    Attributes:
        former: a checkout of another build, with what it needs installed here; None: only this one.
        runs: number of runs of former and now.
        others: number of runs of off and plain.
        steps: updates of a run.
        data: folder made by `glm shards`; by default built once under data/, with 512 pieces.
        json: print one JSON object.
    """

    former: Path | None = None
    runs: int = 32
    others: int = 8
    steps: int = 200
    data: Path | None = None
    json: bool = False


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code."""
    settings: Settings = parse(Settings, arguments, program="python -m experiments.benchmarks runs_per_hour")
    data = settings.data or build(
        Path("data") / "proxy_text", characters=4_000_000, vocabulary=512, sample=500_000, heldout=0.1
    )
    result = measure(settings, data.resolve())
    if settings.json:
        print(json.dumps(result))
    else:
        _show(result, Console())
    return 0


def measure(settings: Settings, data: Path) -> dict[str, Any]:
    """Processor and wall seconds of every run by kind."""
    processor: dict[str, list[float]] = {}
    wall: dict[str, list[float]] = {}
    pool = executors.local(SIDE_BY_SIDE)
    with TemporaryDirectory() as folder, pool:
        began = time.perf_counter()
        starts = [pool.submit(_start) for _ in range(SIDE_BY_SIDE)]
        start = statistics.median(future.result() for future in starts)
        print(f"a worker's start: {start:.1f} s", file=sys.stderr)
        kinds: dict[str, tuple[int, Callable[[list[int], Path], list[float]]]] = {
            "now": (settings.runs, lambda seeds, out: _in_workers(pool, _words(settings, data), seeds, out)),
            "off": (
                settings.others,
                lambda seeds, out: _in_workers(pool, (*_words(settings, data), *OFF), seeds, out),
            ),
            "plain": (
                settings.others,
                lambda seeds, out: [
                    future.result() for future in [pool.submit(_plain, data, settings.steps) for _ in seeds]
                ],
            ),
        }
        if settings.former is not None:
            former = settings.former.resolve()
            kinds = {
                "former": (
                    settings.runs,
                    lambda seeds, out: _alone(former, _words(settings, data), seeds, out),
                ),
                **kinds,
            }
        for first in range(0, settings.runs, SIDE_BY_SIDE):
            seeds = list(range(first, min(first + SIDE_BY_SIDE, settings.runs)))
            for kind, (runs, call) in kinds.items():
                if first >= runs:
                    continue
                out = Path(folder) / kind
                began = time.perf_counter()
                found = call(seeds, out)
                wall.setdefault(kind, []).append((time.perf_counter() - began) / len(seeds))
                processor.setdefault(kind, []).extend(found)
                shutil.rmtree(out, ignore_errors=True)
                print(f"round {first // SIDE_BY_SIDE + 1} {kind}: {found}", file=sys.stderr, flush=True)
    return {"start": start, "processor": processor, "wall": wall}


def _words(settings: Settings, data: Path) -> tuple[str, ...]:
    return ("train", "glm-tiny", *SHAPE, "--steps", str(settings.steps), "--data", str(data))


def _start() -> float:
    """Import what a run needs. Returns the processor seconds spent by then."""
    time.sleep(0.5)  # so that the other worker gets the other start
    import glm.cli  # noqa: F401 - what takes the time

    return _spent()


def _spent() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _in_workers(pool: Executor, words: Sequence[str], seeds: Sequence[int], out: Path) -> list[float]:
    futures = [pool.submit(_run, (*words, "--seed", str(seed)), out / str(seed)) for seed in seeds]
    return [future.result() for future in futures]


def _run(words: Sequence[str], out: Path) -> float:
    out.parent.mkdir(parents=True, exist_ok=True)
    before = _spent()
    code = worker.train([*words, "--out", str(out)], out.with_suffix(".log"))
    assert code == 0, worker.last_line(out.with_suffix(".log"))
    return _spent() - before


def _plain(data: Path, steps: int) -> float:
    before = _spent()
    plain_run(data, steps)
    return _spent() - before


def _alone(tree: Path, words: Sequence[str], seeds: Sequence[int], out: Path) -> list[float]:
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **dict.fromkeys(worker.THREADS, "1"), "PYTHONPATH": str(tree)}
    spent = []
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "glm", *words, "--seed", str(seed), "--out", str(out / str(seed))],
            cwd=tree,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for seed in seeds
    ]
    for process in processes:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, f"glm train failed in {tree}"
        spent.append(usage.ru_utime + usage.ru_stime)
    return spent


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table("", "runs", "processor s a run, median", "wall s a run, median", "runs an hour, two cores")
    medians = {kind: statistics.median(values) for kind, values in result["processor"].items()}
    for kind, values in result["processor"].items():
        wall = statistics.median(result["wall"][kind])
        table.add_row(
            kind, str(len(values)), f"{medians[kind]:.2f}", f"{wall:.1f}", f"{7200 / medians[kind]:,.0f}"
        )
    console.print(table)
    if "former" in medians:
        console.print(f"now makes {medians['former'] / medians['now']:.2f} times the former's runs an hour")
        now = len(result["processor"]["now"])
        with_starts = medians["now"] + SIDE_BY_SIDE * result["start"] / now
        console.print(f"with starts: {medians['former'] / with_starts:.2f} times over {now} runs")
    if "plain" in medians:
        console.print(f"off has {medians['plain'] / medians['off']:.2f} times the plain loop's speed")

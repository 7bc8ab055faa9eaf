"""``python -m experiments``: run a suite, report it, list what there is."""

from __future__ import annotations

import importlib
import json as json_text
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.arm import Suite
from experiments.judging import judge
from experiments.suites import SUITES
from experiments.verdicts import record, words
from stabilitylab.command_line import parse
from stabilitylab.errors import InputError, run_command

USAGE = "usage: python -m experiments {run SUITE | report SUITE | verdicts | judge TABLE.csv | list}; each takes --help"

SuiteName = Annotated[str, tyro.conf.Positional]


def load_suite(name: str) -> Suite:
    """The suite of that name. Raises InputError with the names there are."""
    if name not in SUITES:
        raise InputError(f"there is no suite {name!r}: choose one of {', '.join(SUITES)}")
    suite: Suite = importlib.import_module(SUITES[name]).SUITE
    return suite


def run(
    suite: SuiteName,
    *,
    data: Path | None = None,
    out: Path | None = None,
    steps: int | None = None,
    parallel: int | None = None,
) -> int:
    """Train every arm with every seed; what is complete already is left alone.

    Args:
        suite: name of the suite.
        data: folder made by `glm shards`; by default the suite's own text, built under data/ once.
        out: where the runs go; by default runs/SUITE.
        steps: updates per run instead of the suite's own.
        parallel: runs at a time; by default one a core.
    """
    from experiments.runner import run_suite

    chosen = load_suite(suite)
    if steps is not None and steps < 1:
        raise InputError(f"--steps must be at least 1, got {steps}")
    if parallel is not None and parallel < 1:
        raise InputError(f"--parallel must be at least 1, got {parallel}")
    out = out or Path("runs") / suite
    run_suite(
        chosen,
        data=data or chosen.data(Path("data") / chosen.data.__name__),
        out=out,
        parallel=parallel or len(os.sched_getaffinity(0)),
        steps=steps,
    )
    console = Console()
    console.print(f"runs: {out}")
    console.print(
        f"next: python -m experiments report {suite}"
        + ("" if out == Path("runs") / suite else f" --out {out}")
    )
    return 0


def report(suite: SuiteName, *, out: Path | None = None) -> int:
    """Write report.html into the suite's folder and say where it and the TensorBoard files are.

    Args:
        suite: name of the suite.
        out: where its runs are; by default runs/SUITE.
    """
    from experiments.report import write_report

    out = out or Path("runs") / suite
    path = write_report(load_suite(suite), out)
    console = Console()
    console.print(f"report:      {path}", soft_wrap=True)
    console.print(f"tensorboard: tensorboard --logdir {out}", soft_wrap=True)
    return 0


def verdicts(*, runs: Path = Path("runs"), json: bool = False) -> int:
    """Print the verdict on every claim of every suite that has runs.

    Args:
        runs: folder that holds the suites' folders.
        json: print one JSON object a claim.
    """
    from experiments.metrics import measure
    from experiments.report import judge_suite, load_runs

    found = []
    for name in SUITES:
        if (runs / name).is_dir():
            suite = load_suite(name)
            found += [(name, one) for one in judge_suite(suite, measure(load_runs(suite, runs / name)))]
    if not found:
        raise InputError(
            f"{runs} holds no runs of a suite: first python -m experiments run {next(iter(SUITES))}"
        )
    if json:
        for name, verdict in found:
            print(json_text.dumps({"suite": name, **record(verdict)}, allow_nan=False))
        return 0
    table = Table("suite", "claim", "verdict", "n", "effect", "95 % interval", "e")
    for name, verdict in found:
        one = verdict.decision
        table.add_row(
            name,
            Text(verdict.claim.text),
            words(one) + ("" if verdict.holds else " (not in the family)"),
            str(one.n),
            f"{one.effect:+.3g}",
            f"[{one.low:+.3g}, {one.high:+.3g}]",
            f"{one.e_value:.2g}",
        )
    Console().print(table)
    return 0


def list_suites() -> int:
    """Name every suite and its question."""
    for name in SUITES:
        print(f"{name}: {load_suite(name).question}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"run": run, "report": report, "list": list_suites, "verdicts": verdicts, "judge": judge}
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0

    def command() -> int:
        if words[0] not in commands:
            raise InputError(f"there is no command {words[0]!r}. {USAGE}")
        code: int = parse(commands[words[0]], words[1:], program=f"python -m experiments {words[0]}")
        return code

    return run_command(command)

"""``python -m experiments``: run a suite, report it, list what there is."""

from __future__ import annotations

import json as json_text
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from experiments.adding import run_adding, seconds, with_found
from experiments.arm import Suite
from experiments.asked import load, made
from experiments.cells import through
from experiments.executors import chosen as executor_named
from experiments.judging import judge
from experiments.statistics import Decision
from experiments.study import Study, run_study, shares_of
from experiments.suites import SUITES
from experiments.surviving import show_survival
from experiments.verdicts import Verdict, record
from experiments.worker import keep_freed_memory
from stabilitylab.command_line import parse
from stabilitylab.errors import InputError, run_command

USAGE = (
    "usage: python -m experiments {run SUITE | report SUITE | verdicts [SUITE ...] | survival STUDY | judge TABLE.csv | list}; "
    "SUITE: a name of the list, or a Python file of your own; each takes --help"
)

SuiteName = Annotated[str, tyro.conf.Positional]
SuiteNames = Annotated[tuple[str, ...], tyro.conf.Positional]


def run(
    suite: SuiteName,
    *,
    data: Path | None = None,
    out: Path | None = None,
    steps: int | None = None,
    parallel: int | None = None,
    seeds: int | None = None,
    budget: str | None = None,
    until_decided: bool = False,
    executor: str = "local",
) -> int:
    """Train every arm with every seed; what is complete already is left alone.

    Args:
        suite: name of a suite or study, or a Python file of your own that holds one (FILE.py).
        data: folder made by `glm shards`; by default the suite's own text, built under data/ once.
        out: where the runs go; by default runs/SUITE.
        steps: updates per run instead of the suite's own.
        parallel: runs at a time; by default one a core, and a study in one process.
        seeds: how many instead of the planned ones; until decided: at the most (by default the planned ones, of a suite 16).
        budget: no new seed is begun after this time: 90 (seconds), 15m, 2h.
        until_decided: no new seed is begun once every claim is decided.
        executor: local: processes of this machine; or dask:ADDRESS, ray[:ADDRESS], slurm[:KEY=VALUE,...]: see docs/experiments.md.
    """
    chosen = load(suite)
    limit = None if budget is None else seconds(budget)
    for flag, number in (("steps", steps), ("parallel", parallel), ("seeds", seeds)):
        if number is not None and number < 1:
            raise InputError(f"--{flag} must be at least 1, got {number}")
    if isinstance(chosen, Study) and steps is not None:
        raise InputError(f"{suite} is a study, of its own length: leave --steps out")
    opened = executor_named(executor, parallel, out or Path("runs") / chosen.name)
    out = made(out or Path("runs") / chosen.name)
    if executor != "local":
        # A cluster that does not answer is told of before text is made, which takes minutes.
        opened[0]().shutdown(wait=False)
    if isinstance(chosen, Study):
        keep_freed_memory()
        text = data or chosen.data(Path("data") / chosen.data.__name__)
        run_study(
            chosen,
            data=text,
            out=out,
            seeds=seeds,
            budget=limit,
            until_decided=until_decided,
            through=None
            if (parallel, executor) == (None, "local")
            else through(*opened, asked=suite, data=text),
        )
        console = Console()
        _show_verdicts(console, [(chosen.name, verdict) for verdict in _verdicts_of(chosen, out)])
        _show_shares(console, chosen, out)
        return 0
    whole = chosen
    text = data or whole.data(Path("data") / whole.data.__name__)

    def make(part: Suite) -> None:
        from experiments.runner import run_suite

        run_suite(part, data=text, out=out, parallel=parallel, steps=steps, executor=executor)

    whole = run_adding(
        whole,
        make,
        lambda part: _verdicts_of(part, out),
        seeds=seeds,
        budget=limit,
        until_decided=until_decided,
        places=parallel or os.cpu_count() or 1,
    )
    console = Console()
    _show_verdicts(console, [(whole.name, verdict) for verdict in _verdicts_of(whole, out)])
    console.print(f"runs: {out}", soft_wrap=True)
    console.print(
        f"next: python -m experiments report {suite}"
        + ("" if out == Path("runs") / whole.name else f" --out {out}"),
        soft_wrap=True,
    )
    return 0


def _verdicts_of(asked: Suite | Study, out: Path) -> list[Verdict]:
    """Every claim, from what is in the folder, with whether it holds among all of them."""
    from experiments.results import results_of

    return results_of(asked, out).verdicts


def report(suite: SuiteName, *, out: Path | None = None) -> int:
    """Write report.html into the folder; print the verdicts, the most telling sentence, and where the report lies.

    Args:
        suite: name of the suite or study, or a Python file of your own.
        out: where its runs are; by default runs/SUITE.
    """
    from experiments.report import cause_sentence, telling_sentence, write_report
    from experiments.results import results_of

    asked = load(suite)
    out = out or Path("runs") / asked.name
    asked = with_found(asked, out)
    results = results_of(asked, out)
    path = write_report(asked, out, results=results)
    console = Console()
    _show_verdicts(console, [(results.name, verdict) for verdict in results.verdicts])
    for sentence in (telling_sentence(results), cause_sentence(results)):
        if sentence:
            console.print(Text(sentence), soft_wrap=True)
    console.print(Text(f"report:      {path}"), soft_wrap=True)
    if results.runs:
        console.print(Text(f"tensorboard: tensorboard --logdir {out}"), soft_wrap=True)
    return 0


def verdicts(suites: SuiteNames = (), /, *, runs: Path = Path("runs"), json: bool = False) -> int:
    """Print the verdict on every claim of every suite that has runs.

    Args:
        suites: names, or Python files of your own; by default all of the list.
        runs: folder that holds the suites' folders.
        json: print one JSON object a claim.
    """
    found: list[tuple[str, Verdict]] = []
    for name in suites or SUITES:
        asked = load(name)
        folder = runs / asked.name
        if suites or folder.is_dir():
            try:
                found += [(asked.name, one) for one in _verdicts_of(with_found(asked, folder), folder)]
            except InputError as error:  # a suite without a complete run yet
                if suites:
                    raise
                print(f"left out: {error}", file=sys.stderr)
    if not found:
        raise InputError(
            f"{runs} holds no runs of a suite: first python -m experiments run {next(iter(SUITES))}"
        )
    if json:
        for name, verdict in found:
            print(json_text.dumps({"suite": name, **record(verdict)}, allow_nan=False))
        return 0
    console = Console()
    _show_verdicts(console, found)
    for name in suites or SUITES:
        if isinstance(study := load(name), Study):
            _show_shares(console, study, runs / study.name)
    return 0


def _show_shares(console: Console, study: Study, out: Path) -> None:
    shares = shares_of(study, out)
    if not shares:
        return
    table = Table("share", "arm", "runs", "", "95 % interval, exact", title=study.name, title_justify="left")
    for title, arm, count, of, low, high in shares:
        table.add_row(title, arm, f"{count} of {of}", f"{count / of:.2f}", f"[{low:.2f}, {high:.2f}]")
    console.print(table)


def _show_verdicts(console: Console, found: Sequence[tuple[str, Verdict]]) -> None:
    """A table a suite, narrow enough for eighty columns."""
    for name in dict.fromkeys(name for name, _ in found):
        verdicts = [verdict for one, verdict in found if one == name]
        table = Table(
            Column("claim", ratio=1),
            "verdict",
            Column("n", justify="right"),
            "effect, 95 % interval",
            Column("e-value", justify="right"),
            title=name,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            expand=True,
        )
        if not all(verdict.holds for verdict in verdicts):
            table.caption = "alone: holds at 5 % by itself, not among all claims of its suite (Holm)"
        for verdict in verdicts:
            one = verdict.decision
            would = one.verdict == "undecided" and math.isfinite(one.detectable)
            table.add_row(
                Text(verdict.claim.text),
                one.verdict
                + ("" if verdict.holds else ",\nalone")
                + (f"\n(would see {one.detectable:.2g})" if would else ""),
                str(one.n),
                _effect(one),
                f"{one.e_value:.2g}",
            )
        console.print(table)


def _effect(one: Decision) -> str:
    if not one.n:
        return ""
    bounded = math.isfinite(one.low) or math.isfinite(one.high)
    return f"{one.effect:+.3g}" + (f" [{one.low:+.3g}, {one.high:+.3g}]" if bounded else ", no bounds yet")


def list_suites() -> int:
    """Name every suite and its question."""
    for name in SUITES:
        print(f"{name}: {load(name).question}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "run": run,
        "report": report,
        "list": list_suites,
        "verdicts": verdicts,
        "survival": show_survival,
        "judge": judge,
    }
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0

    def command() -> int:
        if words[0] not in commands:
            raise InputError(f"there is no command {words[0]!r}. {USAGE}")
        code: int = parse(commands[words[0]], words[1:], program=f"python -m experiments {words[0]}")
        return code

    return run_command(command)

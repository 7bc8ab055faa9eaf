"""The commands of ``python -m experiments`` on suites: run one, report it, judge all."""

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

from experiments.arm import Suite
from experiments.execution.cells import through
from experiments.execution.executors import Kept
from experiments.execution.executors import chosen as executor_named
from experiments.execution.sequential import run_adding, seconds, with_found
from experiments.execution.worker import keep_freed_memory
from experiments.lookup import load, made
from experiments.program import program
from experiments.results import Results, results_of
from experiments.study import Study, run_study, shares_of
from experiments.suites import SUITES
from experiments.verdicts import effect_words, evidence_words, record, seeds_words
from stabilitylab.command_line.narrow_tables import print_table
from stabilitylab.errors import InputError

# From this many columns on an effect and its interval fit one line.
WIDE = 110
# TensorBoard's own limit.
MOST_TICKED = 40

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
    report: bool = False,
) -> int:
    """Train every arm with every seed; leaves complete runs alone.

    Args:
        suite: name of a suite or study, or a Python file of your own that holds one (FILE.py).
        data: folder made by `glm shards`; by default the suite's own text, built under data/ once.
        out: where the runs go; by default runs/SUITE.
        steps: updates per run instead of the suite's own.
        parallel: runs at a time; by default one a core for a suite, and one process for a study.
        seeds: number of seeds instead of the planned one; with --until-decided the most (by default 16 for a suite, and the planned
            number for a study).
        budget: begin no new seed after this time: 90 (seconds), 15m, 2h.
        until_decided: begin no new seed once every claim is decided.
        executor: local: processes of this machine; or dask:ADDRESS, ray[:ADDRESS], slurm[:KEY=VALUE,...]: see docs/experiments.md.
        report: write the report at the end, as the command report does.
    """
    chosen = load(suite)
    limit = None if budget is None else seconds(budget)
    for flag, number in (("steps", steps), ("parallel", parallel), ("seeds", seeds)):
        if number is not None and number < 1:
            raise InputError(f"--{flag} must be at least 1, got {number}")
    if isinstance(chosen, Study) and steps is not None:
        raise InputError(f"{suite} is a study, of its own length: leave --steps out")
    out = out or Path("runs") / chosen.name
    opened = executor_named(executor, parallel, out)
    made(out)
    console = Console()
    if isinstance(chosen, Study):
        if executor != "local":
            # A silent cluster must fail before the command makes text, which takes minutes.
            opened[0]().shutdown(wait=False)
        keep_freed_memory()
        text = _text(chosen, data)
        here = (parallel, executor) == (None, "local")
        run_study(
            chosen,
            data=text,
            out=out,
            seeds=seeds,
            budget=limit,
            until_decided=until_decided,
            through=None if here else through(*opened, asked=suite, data=text),
        )
        _show_outcome(console, chosen, out, report=report)
        _show_shares(console, chosen, out)
        return 0
    from experiments.execution.runner import run_suite

    with Kept(*opened) as kept:
        if executor != "local":
            kept.opened()
        text = _text(chosen, data)
        whole = run_adding(
            chosen,
            lambda part: run_suite(part, data=text, out=out, steps=steps, executor=kept),
            lambda part: results_of(part, out).verdicts,
            seeds=seeds,
            budget=limit,
            until_decided=until_decided,
            places=parallel or os.cpu_count() or 1,
        )
    # Seeds from an earlier, longer command count too, as for report and verdicts.
    whole = with_found(whole, out)
    _show_outcome(console, whole, out, report=report)
    if not report:
        elsewhere = "" if out == Path("runs") / whole.name else f" --out {out}"
        console.print(f"runs: {out}", soft_wrap=True)
        console.print(f"next: {program()} report {suite}{elsewhere}", soft_wrap=True)
    return 0


def _text(chosen: Suite | Study, data: Path | None) -> Path:
    """The folder of shards to train on: the given one, else the suite's own, made at first use."""
    return data or chosen.data(Path("data") / chosen.data.__name__)


def _show_outcome(console: Console, chosen: Suite | Study, out: Path, *, report: bool) -> None:
    """The report, where it is asked for; else the verdicts alone."""
    if report:
        _report(console, chosen, out)
    else:
        _show_verdicts(console, [results_of(chosen, out)])


def report(suite: SuiteName, *, out: Path | None = None) -> int:
    """Write report.html into the folder; print the verdicts, the most telling sentence, and where the report lies.

    Args:
        suite: name of the suite or study, or a Python file of your own.
        out: where its runs are; by default runs/SUITE.
    """
    asked = load(suite)
    out = out or Path("runs") / asked.name
    _report(Console(), with_found(asked, out), out)
    return 0


def _report(console: Console, asked: Suite | Study, out: Path) -> None:
    from experiments.report.headline import cause_sentence, telling_sentence
    from experiments.report.page import write_report

    results = results_of(asked, out)
    path = write_report(asked, out, results=results)
    _show_verdicts(console, [results])
    for sentence in (telling_sentence(results), cause_sentence(results)):
        if sentence:
            console.print(Text(sentence), soft_wrap=True)
    console.print(Text(f"report:      {path}"), soft_wrap=True)
    if results.runs:
        console.print(Text(f"tensorboard: tensorboard --logdir {out}" + _filter(results)), soft_wrap=True)


def _filter(results: Results) -> str:
    """TensorBoard ticks none of more than forty runs: a filter to type for some telling ones."""
    if len(results.runs) <= MOST_TICKED:
        return ""
    worst = next(iter(results.broken), results.runs[0])
    alike = worst.run.name.removeprefix(worst.arm)
    return (
        f", then filter its runs by {alike.lstrip('-')} and tick them: of that many it ticks none by default"
    )


def verdicts(suites: SuiteNames = (), /, *, runs: Path = Path("runs"), json: bool = False) -> int:
    """Print the verdict on every claim of every suite that has runs.

    Args:
        suites: names, or Python files of your own; by default all of the list.
        runs: folder that holds the suites' folders.
        json: print one JSON object a claim.
    """
    found: list[Results] = []
    for name in suites or SUITES:
        asked = load(name)
        folder = runs / asked.name
        if suites or folder.is_dir():
            try:
                found.append(results_of(with_found(asked, folder), folder))
            except InputError as error:  # a suite without a complete run yet
                if suites:
                    raise
                print(f"left out: {error}", file=sys.stderr)
    if not found:
        raise InputError(f"{runs} holds no runs of a suite: first {program()} run {next(iter(SUITES))}")
    if json:
        for results in found:
            for verdict in results.verdicts:
                print(json_text.dumps({"suite": results.name, **record(verdict)}, allow_nan=False))
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
    print_table(console, table)


def _show_verdicts(console: Console, found: Sequence[Results]) -> None:
    """One table per suite, narrow enough for eighty columns, and what its words mean."""
    between = " " if console.width >= WIDE else "\n"
    for results in found:
        table = Table(
            Column("claim", ratio=1),
            "verdict",
            Column("seeds", justify="right"),
            "effect [95 %]",
            Column("e-value", justify="right"),
            title=results.name,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            expand=True,
            padding=(0, 1, 0, 0),
        )
        for verdict in results.verdicts:
            one = verdict.decision
            would = one.verdict == "undecided" and math.isfinite(one.detectable)
            table.add_row(
                Text(verdict.claim.text),
                one.verdict
                + ("" if verdict.holds else ",\nalone")
                + (f"\n({one.detectable:.2g} would show)" if would else ""),
                seeds_words(verdict),
                effect_words(verdict, results.outcomes[verdict.claim.metric]).replace(" [", f"{between}["),
                evidence_words(one.e_value),
            )
        print_table(console, table)
    verdicts = [verdict for results in found for verdict in results.verdicts]
    legend = [
        "seeds: those that the verdict took of those that were run",
        "e-value: from 20 on decided at 5 %",
    ]
    if any(one.judgement == "undecided" and math.isfinite(one.decision.detectable) for one in verdicts):
        legend.append("would show: what so many seeds find with a power of 80 %")
    if not all(verdict.holds for verdict in verdicts):
        legend.append("alone: at 5 % by itself, not among all claims of its suite (Holm)")
    if verdicts:
        console.print(Text("; ".join(legend), style="dim"))

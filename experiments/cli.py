"""``python -m experiments``: run a suite, report it, list what there is."""

from __future__ import annotations

import importlib
import json as json_text
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
from experiments.study import Study, judged, run_study
from experiments.suites import SUITES
from experiments.verdicts import Verdict, record
from experiments.worker import keep_freed_memory
from stabilitylab.command_line import parse
from stabilitylab.errors import InputError, run_command

USAGE = "usage: python -m experiments {run SUITE | report SUITE | verdicts | judge TABLE.csv | list}; each takes --help"

SuiteName = Annotated[str, tyro.conf.Positional]


def load_suite(name: str) -> Suite:
    """The suite of that name. Raises InputError with the names there are."""
    suite = load(name)
    if not isinstance(suite, Suite):
        raise InputError(
            f"{name} is a study: its numbers are in values.jsonl; python -m experiments verdicts judges them"
        )
    return suite


def load(name: str) -> Suite | Study:
    """The suite or study of that name. Raises InputError with the names there are."""
    if name not in SUITES:
        raise InputError(f"there is no suite {name!r}: choose one of {', '.join(SUITES)}")
    module = importlib.import_module(SUITES[name])
    found: Suite | Study = module.STUDY if hasattr(module, "STUDY") else module.SUITE
    return found


def run(
    suite: SuiteName,
    *,
    data: Path | None = None,
    out: Path | None = None,
    steps: int | None = None,
    parallel: int | None = None,
    seeds: int | None = None,
    budget: float | None = None,
    until_decided: bool = False,
    executor: str = "local",
) -> int:
    """Train every arm with every seed; what is complete already is left alone.

    Args:
        suite: name of the suite.
        data: folder made by `glm shards`; by default the suite's own text, built under data/ once.
        out: where the runs go; by default runs/SUITE.
        steps: updates per run instead of the suite's own.
        parallel: runs at a time; by default one a core.
        seeds: of a study: how many instead of its own.
        budget: of a study: seconds after which no new seed is begun.
        until_decided: of a study: no new seed once every claim is decided.
        executor: local: processes of this machine; dask:ADDRESS: the workers of a Dask cluster.
    """
    from experiments.runner import run_suite

    chosen = load(suite)
    if isinstance(chosen, Study):
        if steps is not None or parallel is not None or executor != "local":
            raise InputError(
                f"{suite} is a study, in one process and of its own length: "
                "leave --steps, --parallel and --executor out"
            )
        return _run_study(chosen, data, out, seeds=seeds, budget=budget, until_decided=until_decided)
    if seeds is not None or budget is not None or until_decided:
        raise InputError(
            f"--seeds, --budget and --until-decided are for studies, and {suite} is none: leave them out"
        )
    if steps is not None and steps < 1:
        raise InputError(f"--steps must be at least 1, got {steps}")
    if parallel is not None and parallel < 1:
        raise InputError(f"--parallel must be at least 1, got {parallel}")
    out = out or Path("runs") / suite
    run_suite(
        chosen,
        data=data or chosen.data(Path("data") / chosen.data.__name__),
        out=out,
        parallel=parallel,
        steps=steps,
        executor=executor,
    )
    console = Console()
    console.print(f"runs: {out}")
    console.print(
        f"next: python -m experiments report {suite}"
        + ("" if out == Path("runs") / suite else f" --out {out}")
    )
    return 0


def _run_study(
    study: Study,
    data: Path | None,
    out: Path | None,
    *,
    seeds: int | None,
    budget: float | None,
    until_decided: bool,
) -> int:
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}")
    out = out or Path("runs") / study.name
    keep_freed_memory()
    run_study(
        study,
        data=data or study.data(Path("data") / study.data.__name__),
        out=out,
        seeds=seeds,
        budget=budget,
        until_decided=until_decided,
    )
    Console().print(_table([(study.name, verdict) for verdict in judged(study, out)]))
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
            suite = load(name)
            if isinstance(suite, Study):
                found += [(name, one) for one in judged(suite, runs / name)]
            else:
                found += [(name, one) for one in judge_suite(suite, measure(load_runs(suite, runs / name)))]
    if not found:
        raise InputError(
            f"{runs} holds no runs of a suite: first python -m experiments run {next(iter(SUITES))}"
        )
    if json:
        for name, verdict in found:
            print(json_text.dumps({"suite": name, **record(verdict)}, allow_nan=False))
        return 0
    Console().print(_table(found))
    return 0


def _table(found: Sequence[tuple[str, Verdict]]) -> Table:
    table = Table("suite", "claim", "verdict", "n", "effect", "95 % interval", "e")
    if not all(verdict.holds for _, verdict in found):
        table.caption = "alone: holds at 5 % by itself, not among all claims of its suite (Holm)"
    for name, verdict in found:
        one = verdict.decision
        table.add_row(
            name,
            Text(verdict.claim.text),
            one.verdict + ("" if verdict.holds else ", alone"),
            str(one.n),
            f"{one.effect:+.3g}",
            f"[{one.low:+.3g}, {one.high:+.3g}]",
            f"{one.e_value:.2g}",
        )
    return table


def list_suites() -> int:
    """Name every suite and its question."""
    for name in SUITES:
        print(f"{name}: {load(name).question}")
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

"""A study: a question whose runs are small enough to make by the hundred, in one process.

A suite's arm is one ``glm train`` command per seed, with a folder. A study's cell (an arm, a seed) is a measurement: it may search
for the rate that the arm bears, fork a state, or read initial weights, and leaves a few named numbers, one line of
``values.jsonl``:

    {"arm": "egs", "seed": 3, "seconds": 2.1, "values": {"frontier": -2.5, "heldout": 4.61}}

So an interrupted study goes on where it was, and anything that reads JSON can judge its numbers. Seeds are the outer loop: whenever
it stops, arms have the same seeds. They begin at 1, or beyond the seeds of an earlier study whose results are known: seed 0 is for
trying a study out. Predictions are in the study's file, which its author commits before the first run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.arm import Arm
from experiments.statistics import LEAST_SEEDS, Scale
from experiments.statistics.proportions import share_bounds
from experiments.trial import configured
from experiments.verdicts import Claim, Verdict, judge_all, undecided_together
from glm.train.config import TrainConfig

VALUES = "values.jsonl"
# A cell's numbers by name, and their processor seconds.
Measured = tuple[Mapping[str, float], float]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The meaning of a cell's number, and the smallest difference that matters.

    Attributes:
        title: for tables.
        unit: of a difference, after ``scale``.
        scale: "log": compare arms by the logarithm of their ratio; "rank": values are counts, infinite or on a grid.
        margin: the smallest effect of interest, in the unit (natural logarithm for "log"): two arms within it are equivalent.
        watched: for a step at which something happens: the last step watched. Infinite values had nothing by then.
    """

    title: str
    margin: float
    unit: str = ""
    scale: Scale = "linear"
    watched: float | None = None

    @property
    def worst(self) -> None:
        """A seed without a number drops out: a cell names what it measured, and a run that died has an infinite number."""
        return None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A measurement's input.

    Attributes:
        arm, seed: of the cell.
        config: the arm's configuration with the seed in it.
        data: folder made by ``glm shards``.
    """

    arm: Arm
    seed: int
    config: TrainConfig
    data: Path


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question.

    Attributes:
        name: on the command line.
        question: in words.
        claims: to judge, each on a metric in ``outcomes``.
        predictions: written down before the first run.
        outcomes: the numbers by name.
        measure: makes a cell's numbers.
        preset, settings: as of ``experiments.arm.Suite``.
        seeds: number planned, from ``first`` on.
        data: makes the data folder if need be and returns it.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    predictions: tuple[str, ...]
    outcomes: Mapping[str, Outcome]
    measure: Callable[[Cell], Mapping[str, float]]
    seeds: int
    data: Callable[[Path], Path]
    first: int = 1
    preset: str = "glm-tiny"
    settings: Mapping[str, str] = field(default_factory=dict)

    def cell(self, arm: Arm, seed: int, data: Path) -> Cell:
        """The measurement's input."""
        settings = {**self.settings, **arm.settings, "seed": str(seed)}
        return Cell(arm=arm, seed=seed, config=configured(self.preset, settings, data=data), data=data)


def run_study(
    study: Study,
    *,
    data: Path,
    out: Path,
    seeds: int | None = None,
    budget: float | None = None,
    until_decided: bool = False,
    through: Callable[[Sequence[tuple[str, int]]], Iterator[Measured]] | None = None,
) -> None:
    """Measure the missing cells.

    Args:
        seeds: how many; None: as planned.
        budget: seconds after which no new seed begins.
        until_decided: no new seed begins once every claim is decided, alone and within the study's family.
        through: measures cells (arm, seed), in their order (``experiments.execution.cells``); None: one after the other, here.
    """
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    file, console = out / VALUES, Console(stderr=True)
    done = {(one["arm"], one["seed"]) for one in _lines(file)}
    if file.is_file() and not file.read_bytes().endswith(b"\n"):
        with file.open("a", encoding="utf-8") as stream:
            stream.write("\n")  # after a line that a kill cut short
    started = time.monotonic()
    count = study.seeds if seeds is None else seeds
    cells = [
        (arm.name, seed)
        for seed in range(study.first, study.first + count)
        for arm in study.arms
        if (arm.name, seed) not in done
    ]
    results = (_here(study, data) if through is None else through)(cells)
    with _bar(console, study.name, total=len(cells)) as tell:
        for looked, seed in enumerate(range(study.first, study.first + count), start=1):
            if budget is not None and time.monotonic() - started > budget:
                console.print(f"{study.name}: the budget is spent before seed {seed}")
                break
            for arm in study.arms:
                if (arm.name, seed) in done:
                    continue
                tell(f"{arm.name}, seed {seed}")
                values, spent = next(results)
                with file.open("a", encoding="utf-8") as stream:
                    line = {"arm": arm.name, "seed": seed, "seconds": round(spent, 2), "values": values}
                    stream.write(json.dumps(line) + "\n")
            console.print(
                f"{study.name}: seed {seed} done, {time.monotonic() - started:.0f} s", highlight=False
            )
            if until_decided and looked >= LEAST_SEEDS and not undecided_together(judged(study, out)):
                console.print(f"{study.name}: every claim is decided")
                break


@contextmanager
def _bar(console: Console, name: str, *, total: int) -> Iterator[Callable[[str], None]]:
    """On a terminal shows a bar; yields a function to call with each cell before measuring it."""
    columns = (
        TextColumn(f"[bold]{name}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[said]}", markup=False),
        TimeElapsedColumn(),
    )
    begun = 0
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(name, total=total, said="")

        def tell(cell: str) -> None:
            nonlocal begun
            progress.update(task, completed=begun, said=f"{begun} of at most {total}: {cell}")
            begun += 1

        yield tell


def _here(study: Study, data: Path) -> Callable[[Sequence[tuple[str, int]]], Iterator[Measured]]:
    arms = {arm.name: arm for arm in study.arms}

    def measured(cells: Sequence[tuple[str, int]]) -> Iterator[Measured]:
        for arm, seed in cells:
            began = time.process_time()
            values = dict(study.measure(study.cell(arms[arm], seed, data)))
            yield values, time.process_time() - began

    return measured


def judged(study: Study, out: Path) -> list[Verdict]:
    """The verdict on every claim that has values, at every look, and whether it holds in the study's family."""
    return judge_all(study.claims, values_of(out), study.outcomes)


def shares_of(study: Study, out: Path) -> list[tuple[str, str, int, int, float, float]]:
    """For each outcome that is a share and each arm: title, arm, how many, of how many, Clopper and Pearson's interval (95 %)."""
    values = values_of(out)
    found = []
    for name, outcome in study.outcomes.items():
        if outcome.unit != "share" or not yes_or_no(values.get(name, {}).values()):
            continue
        for arm in study.arms:
            seen = [one for one in values.get(name, {}).get(arm.name, {}).values() if not math.isnan(one)]
            if seen:
                count, of = int(sum(seen)), len(seen)
                found.append(
                    (outcome.title, arm.name, count, of, *share_bounds(count, of, 0.05, sequential=False))
                )
    return found


def yes_or_no(arms: Iterable[Mapping[int, float]]) -> bool:
    """Whether all values are yes or no: a share of channels may be 0 in all seeds of one arm, and is no count."""
    return {one for by_seed in arms for one in by_seed.values() if not math.isnan(one)} <= {0.0, 1.0}


def values_of(out: Path) -> dict[str, dict[str, dict[int, float]]]:
    """The measured ``values[metric][arm][seed]``."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for line in _lines(out / VALUES):
        for metric, value in line["values"].items():
            found.setdefault(metric, {}).setdefault(line["arm"], {})[line["seed"]] = float(value)
    return found


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    # A kill cut this line short: measure its cell again.
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines

"""Adds seeds to a suite one after another, until its claims are decided or the time is up.

The first four seeds come at once, since no verdict rests on fewer; then one at a time, or as many as fill the places for runs.
Under a budget the first ones come so too: one group's runs at most overrun it. The verdicts hold at every look
(``experiments.statistics``), so one may stop at any.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import overload

from rich.console import Console

from experiments.arm import Suite
from experiments.statistics import LEAST_SEEDS
from experiments.study import Study
from experiments.verdicts import Verdict, undecided_together
from stabilitylab.errors import InputError

# Seeds of a suite that runs until decided, if it plans fewer and the command names none.
MOST_SEEDS = 16
UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """``90``, ``90s``, ``15m`` or ``2h`` in seconds. Raises InputError on anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not found or not float(found[1]) > 0:
        raise InputError(f"a budget of {text!r}: give seconds, or 90s, 15m, 2h")
    return float(found[1]) * UNITS[found[2]]


def first_seeds(planned: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` seeds: the planned ones first, then those after the largest."""
    seeds = list(planned[:count])
    after = max(planned, default=-1) + 1
    return (*seeds, *range(after, after + count - len(seeds)))


@overload
def with_found(asked: Suite, out: Path) -> Suite: ...
@overload
def with_found(asked: Study, out: Path) -> Study: ...
def with_found(asked: Suite | Study, out: Path) -> Suite | Study:
    """The same, a suite with all seeds that have a folder, even those beyond the planned ones."""
    if isinstance(asked, Study) or not out.is_dir():
        return asked
    found = {
        int(end[1])
        for path in out.iterdir()
        if path.is_dir() and (end := re.search(r"-seed(\d+)$", path.name))
    }
    return dataclasses.replace(asked, seeds=(*asked.seeds, *sorted(found - set(asked.seeds))))


def run_adding(
    suite: Suite,
    run: Callable[[Suite], None],
    judge: Callable[[Suite], Sequence[Verdict]],
    *,
    seeds: int | None = None,
    budget: float | None = None,
    until_decided: bool = False,
    places: int = 1,
) -> Suite:
    """Run a suite's seeds in groups. Returns the suite with the seeds that ran.

    Args:
        run: makes the runs of a suite with all seeds up to now; leaves complete runs alone.
        judge: judges every claim from the runs of such a suite.
        seeds: most seeds; None: as planned, for a suite that runs until decided ``MOST_SEEDS`` at least.
        budget: seconds after which no new seed begins.
        until_decided: no new seed begins once every claim is decided, alone and within the suite's family.
        places: runs at a time.
    """
    console, started = Console(stderr=True), time.monotonic()
    planned = len(suite.seeds)
    most = seeds if seeds is not None else max(planned, MOST_SEEDS) if until_decided else planned
    asked = first_seeds(suite.seeds, most)
    if budget is None and not until_decided:
        whole = dataclasses.replace(suite, seeds=asked)
        run(whole)
        return whole
    per_seed = len(suite.arms) * max(1, len(suite.rates))
    step = max(1, math.ceil(places / per_seed))
    at = 0
    while at < len(asked):
        at = min(len(asked), max(at + step, LEAST_SEEDS if budget is None else 0))
        part = dataclasses.replace(suite, seeds=asked[:at])
        run(part)
        if until_decided and at >= LEAST_SEEDS and not undecided_together(judge(part)):
            console.print(f"{suite.name}: every claim is decided after {at} seeds")
            return part
        if budget is not None and time.monotonic() - started > budget and at < len(asked):
            few = (
                f": a verdict needs {LEAST_SEEDS}, run the command again to continue"
                if at < LEAST_SEEDS
                else ""
            )
            console.print(
                f"{suite.name}: the budget is spent after {at} of {len(asked)} seeds{few}", soft_wrap=True
            )
            return part
    return dataclasses.replace(suite, seeds=asked)

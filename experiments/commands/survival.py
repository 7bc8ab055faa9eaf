"""``python -m experiments survival STUDY``: how long each arm's runs live, with runs counted only as long as they were watched.

It shows Kaplan and Meier's curve per arm (``experiments.outcomes``) for every outcome that is a step at which something happens
(``Outcome.watched``).
"""

from __future__ import annotations

import json as json_text
import math
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from experiments.lookup import load
from experiments.outcomes import Survival, survival
from experiments.program import program
from experiments.study import Study, values_of
from stabilitylab.command_line.narrow_tables import print_table
from stabilitylab.errors import InputError

Name = Annotated[str, tyro.conf.Positional]


def show_survival(study: Name, *, runs: Path = Path("runs"), json: bool = False) -> int:
    """Print each arm's survival curve.

    Args:
        study: name of a study, or a Python file of your own.
        runs: folder that holds the studies' folders.
        json: print one JSON object for each outcome.
    """
    asked = load(study)
    times = (
        {name: one for name, one in asked.outcomes.items() if one.watched is not None}
        if isinstance(asked, Study)
        else {}
    )
    if not times:
        raise InputError(f"{study} has no outcome that is a time: restart-ladder has one")
    values = values_of(runs / asked.name)
    if not values:
        raise InputError(
            f"{runs / asked.name} holds no values of {asked.name}: first {program()} run {study}"
        )
    for name, outcome in times.items():
        curves = {
            arm: _curve(list(by_seed.values()), outcome.watched or math.inf)
            for arm, by_seed in values.get(name, {}).items()
        }
        if json:
            body = {
                "study": asked.name,
                "outcome": name,
                "arms": {arm: _plain(one) for arm, one in curves.items()},
            }
            print(json_text.dumps(body, allow_nan=False))
            continue
        table = Table(
            "arm", "runs", "collapsed", "median", "alive at the end", "95 % interval", title=outcome.title
        )
        for arm, one in curves.items():
            alive, low, high = (
                (one.share[-1], one.low[-1], one.high[-1]) if one.steps else (1.0, math.nan, 1.0)
            )
            table.add_row(
                arm,
                str(one.runs),
                str(one.collapsed),
                f"{one.median:g}" if math.isfinite(one.median) else "not reached",
                f"{alive:.0%}",
                f"[{low:.0%}, {high:.0%}]" if math.isfinite(low) else "",
            )
        print_table(Console(), table)
    return 0


def _curve(lived: list[float], watched: float) -> Survival:
    collapsed = [step for step in lived if step <= watched]
    return survival(collapsed, [watched] * (len(lived) - len(collapsed)))


def _plain(curve: Survival) -> dict[str, object]:
    return {
        "runs": curve.runs,
        "collapsed": curve.collapsed,
        "median": curve.median if math.isfinite(curve.median) else None,
        "steps": list(curve.steps),
        "share": list(curve.share),
        "low": list(curve.low),
        "high": list(curve.high),
    }

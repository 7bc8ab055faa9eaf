"""Compares six warnings of a collapse, and all of them combined, on the same runs: lead, precision, recall at equal false-alarm
rates, cost.

    python -m experiments.benchmarks precursor_trial --runs 100 --lost 60 --out trial [--score] [--json]
    python -m experiments.benchmarks precursor_trial --cause noise --runs 40 --out trial
    python -m experiments.benchmarks precursor_trial --frontier 60 --out trial
    python -m experiments.benchmarks precursor_trial --score --out trial --norms run.csv ...

The runs (``_trial_runs.py``): a rate, noise in a layer, a decay or a format's scale that grows to plateaus on both sides of the
frontier. Each precursor is a score by step:

    gradient norm, update norm, kurtosis    log of the value over its median of the last 10 measurements
    stable rank, QK entropy                 the same, of what falls: the median over the value
    margin                                  minus its log: no history needed
    level of the gradient norm, ...         log of the value alone, for those that have one
    margin, trend                           the margin that a line through the last 10 foresees at the horizon
    combined                                logistic regression on the six, fitted on one half of the runs
    combined, trend                         the same on those, the levels, the foreseen margin and its slope

An *alarm* is a score over a threshold, with none within ``QUIET`` steps before it. It is right where the collapse's onset follows
within ``HORIZON`` steps, false where none does; after the onset none counts. Each half of the runs sets a threshold with as many
false alarms as the rate allows, and the other half judges it: so each half is judged once.

``--frontier N`` compares the margin with the bisected frontier of N configurations (``_trial_frontier.py``). The trial counts the
event ``at-risk`` (a margin below 1 twice in a row) in the steps before anything grows and in those of survivors. ``--norms`` judges
the gradient norm's two scores, at the trial's thresholds, on tables of real, healthy runs (columns step and grad_norm).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from scipy.stats import binomtest

from experiments.benchmarks._trial_frontier import correlation, frontier_of
from experiments.benchmarks._trial_runs import CALM, CAUSES, EVERY, MOSTLY_LOST, NAMES, run

Floats = NDArray[np.float64]
HORIZON, QUIET, PAST, FIRST = 24, 16, 10, CALM
# False alarms per thousand steps at risk; the first is the limit for an alarm that is on by default.
RATES = (0.1, 1.0, 5.0)
FALLING = ("stable rank", "QK entropy")
LEVELS = ("gradient norm", "update norm", "kurtosis")
TREND, SLOPE = "margin, trend", "margin, slope"
# Inputs of the two combinations.
COMBINED = {
    "combined": NAMES,
    "combined, trend": (*NAMES, *(f"{name}, level" for name in LEVELS), TREND, SLOPE),
}
ALL = (*NAMES, *(f"{name}, level" for name in LEVELS), TREND, *COMBINED)


def main(argv: Sequence[str]) -> int:
    """Make the missing runs, judge, print."""
    parser = argparse.ArgumentParser(prog="experiments.benchmarks precursor_trial")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--lost", type=int, default=60, help="further runs, of rates that few bear")
    parser.add_argument("--cause", choices=CAUSES, default="rate", help="what grows in the runs to make")
    parser.add_argument("--frontier", type=int, default=0, help="configurations whose frontier is bisected")
    parser.add_argument(
        "--norms", type=Path, nargs="+", default=[], help="CSV of healthy runs: step, grad_norm"
    )
    parser.add_argument("--out", type=Path, default=Path("trial"))
    parser.add_argument("--score", action="store_true", help="make none: judge those that are there")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "runs.jsonl"
    rows = read(file)
    for row in rows:
        row.setdefault("cause", "rate")
    done = {(row["cause"], row["seed"]) for row in rows}
    lost = range(MOSTLY_LOST, MOSTLY_LOST + asked.lost) if asked.cause == "rate" else ()
    make = not (asked.score or asked.frontier)
    for seed in (*range(asked.runs), *lost) if make else ():
        if (asked.cause, seed) not in done:
            rows.append(run(seed, asked.cause))
            _append(file, rows[-1])
    edges = read(asked.out / "frontier.jsonl")
    for seed in range(len(edges), asked.frontier):
        edges.append(frontier_of(seed))
        _append(asked.out / "frontier.jsonl", edges[-1])
    found = judge(rows) if rows else {}
    found["frontier"] = correlation(edges)
    if asked.norms:
        found["real norms"] = {
            f"{file.stem}, {name} @ {rate:g}": real_norms(file, name, rows, rate)
            for file in asked.norms
            for name in ("gradient norm", "gradient norm, level")
            for rate in RATES
        }
    if asked.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0


def _append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """The existing runs."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # a kill
            continue
    return rows


def scores(row: dict[str, Any]) -> tuple[NDArray[np.int64], dict[str, Floats]]:
    """Steps with all measurements, and each precursor's score there."""
    series = {name: {int(s): v for s, v in row["scores"][name].items()} for name in NAMES}
    end = row["onset"] if row["onset"] is not None else len(row["loss"])
    steps = np.array(sorted(set.intersection(*(set(of) for of in series.values()))), dtype=np.int64)
    steps = steps[steps < end]
    found: dict[str, Floats] = {}
    for name in NAMES:
        value = np.array([series[name][int(s)] for s in steps], dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            log = np.log(value)
        if name == "margin":
            bounded = np.clip(log, -10, 10)
            found[name] = -bounded
            found[TREND], found[SLOPE] = trend(bounded)
            continue
        usual = np.array(
            [np.median(log[max(0, i - PAST) : i]) if i >= 4 else np.nan for i in range(len(log))]
        )
        found[name] = (usual - log if name in FALLING else log - usual) if len(log) else log
        if name in LEVELS:
            found[f"{name}, level"] = log
    keep = steps >= FIRST
    return steps[keep], {
        name: np.nan_to_num(score[keep], nan=-10.0, posinf=10.0, neginf=-10.0)
        for name, score in found.items()
    }


def trend(log: Floats) -> tuple[Floats, Floats]:
    """Minus the value that a line through the last ``PAST`` measurements, set at their median, reaches after a horizon, and minus
    its slope per measurement (0 before the fourth).
    """
    ahead = HORIZON / EVERY
    foreseen, slopes = np.empty(len(log)), np.zeros(len(log))
    for i in range(len(log)):
        past = log[max(0, i - PAST + 1) : i + 1]
        if len(past) >= 4:
            slopes[i] = np.polyfit(np.arange(len(past)), past, 1)[0]
        foreseen[i] = np.median(past) + ahead * slopes[i]
    return -foreseen, -slopes


class Prepared:
    """A run's scores, and its steps at risk."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.onset: int | None = row["onset"]
        self.cause: str = row["cause"]
        self.steps, self.scores = scores(row)
        near = (
            np.zeros(len(self.steps), dtype=bool)
            if self.onset is None
            else self.onset - self.steps <= HORIZON
        )
        self.warns = near

    def alarms(self, name: str, threshold: float) -> list[int]:
        """Places of the alarms."""
        found: list[int] = []
        for place in np.flatnonzero(self.scores[name] > threshold):
            if not found or self.steps[place] - self.steps[found[-1]] > QUIET:
                found.append(int(place))
        return found


def combine(fitted: list[Prepared], judged: list[Prepared], combined: str) -> None:
    """Give both halves the combined score: logistic regression with a little ridge, on standardized scores."""
    names = list(COMBINED[combined])
    x = np.concatenate([np.stack([one.scores[n] for n in names], axis=1) for one in fitted])
    y = np.concatenate([one.warns for one in fitted]).astype(np.float64)
    middle, spread = x.mean(axis=0), x.std(axis=0) + 1e-9
    z = (x - middle) / spread

    def loss(w: Floats) -> float:
        logit = z @ w[1:] + w[0]
        return float(np.mean(np.logaddexp(0, logit) - y * logit) + 1e-3 * np.sum(w[1:] ** 2))

    weights = minimize(loss, np.zeros(len(names) + 1), method="L-BFGS-B").x
    for one in (*fitted, *judged):
        own = (np.stack([one.scores[n] for n in names], axis=1) - middle) / spread
        one.scores[combined] = own @ weights[1:] + weights[0]


def threshold_for(runs: list[Prepared], name: str, rate: float) -> float:
    """The lowest threshold with at most ``rate`` false alarms per thousand steps without a following collapse."""
    at_risk = sum(int((~one.warns).sum()) for one in runs) * 2  # measured at every second step
    allowed = rate * at_risk / 1000
    candidates = np.unique(np.concatenate([one.scores[name] for one in runs]))
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        false = sum(not one.warns[p] for one in runs for p in one.alarms(name, candidates[middle]))
        low, high = (low, middle) if false <= allowed else (middle + 1, high)
    return float(candidates[low])


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Judge each precursor at each rate, over both halves."""
    halves = [[row for row in rows if row["seed"] % 2 == half] for half in (0, 1)]
    table: dict[str, Any] = {}
    pairs = []
    for half in (0, 1):
        fitted, judged = [Prepared(r) for r in halves[half]], [Prepared(r) for r in halves[1 - half]]
        for combined in COMBINED:
            combine(fitted, judged, combined)
        pairs.append((fitted, judged))
    for name in ALL:
        for rate in RATES:
            right = false = warned = collapses = steps = 0
            leads: list[int] = []
            by_cause = {cause: [0, 0] for cause in CAUSES}
            for fitted, judged in pairs:
                threshold = threshold_for(fitted, name, rate)
                for one in judged:
                    places = one.alarms(name, threshold)
                    good = [p for p in places if one.warns[p]]
                    right, false = right + len(good), false + len(places) - len(good)
                    steps += 2 * int((~one.warns).sum())
                    if one.onset is not None:
                        collapses += 1
                        warned += bool(good)
                        by_cause[one.cause][0] += bool(good)
                        by_cause[one.cause][1] += 1
                        leads += [int(one.onset - one.steps[good[0]])] if good else []
            table[f"{name} @ {rate:g}"] = {
                "recall": [warned, collapses],
                "precision": [right, right + false],
                "false per 1,000 steps": 1000 * false / max(1, steps),
                "lead": float(np.median(leads)) if leads else None,
                "recall by cause": {cause: of for cause, of in by_cause.items() if of[1]},
            }
    return {
        "runs": len(rows),
        "collapses": sum(row["onset"] is not None for row in rows),
        "survivors": sum(row["onset"] is None for row in rows),
        "table": table,
        "milliseconds": {
            name: float(np.median([row["milliseconds"][name] for row in rows])) for name in NAMES
        },
        "at-risk": at_risk(rows),
    }


def at_risk(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Events at-risk, and steps: before anything grows, in survivors, and (collapses warned of, collapses)."""
    calm, survivors, warned = [0, 0], [0, 0], [0, 0]
    for row in rows:
        margin = sorted((int(step), value) for step, value in row["scores"]["margin"].items())
        below = [value < 1.0 for _, value in margin]
        begins = [
            margin[i][0]
            for i in range(1, len(below))
            if below[i] and below[i - 1] and not (i > 1 and below[i - 2])
        ]
        calm[0] += sum(step < CALM for step in begins)
        calm[1] += CALM - CALM // 2
        if row["onset"] is None:
            survivors[0] += sum(step >= CALM for step in begins)
            survivors[1] += len(row["loss"]) - CALM
        else:
            warned[0] += any(0 <= row["onset"] - step <= HORIZON for step in begins)
            warned[1] += 1
    return {
        "events and steps before anything grows": calm,
        "events and steps of survivors": survivors,
        "collapses warned of, of": warned,
    }


def real_norms(file: Path, name: str, rows: list[dict[str, Any]], rate: float) -> dict[str, float]:
    """Alarms of a precursor on a real run's gradient norms, at the threshold of all of the trial's runs."""
    table = pd.read_csv(file).dropna(subset=["grad_norm"])
    log = np.log(table["grad_norm"].to_numpy(dtype=np.float64))
    usual = pd.Series(log).shift(1).rolling(PAST, min_periods=4).median().to_numpy()
    score = log - usual if name == "gradient norm" else log
    threshold = threshold_for([Prepared(row) for row in rows], name, rate)
    steps, alarms = table["step"].to_numpy(), list[int]()
    for place in np.flatnonzero(score > threshold):
        if not alarms or steps[place] - alarms[-1] > QUIET:
            alarms.append(int(steps[place]))
    of = int(steps[-1] - steps[0] + 1)
    return {
        "alarms": len(alarms),
        "steps": of,
        "a 10,000": 1e4 * len(alarms) / of,
        "after the first 1,000": sum(step >= 1000 for step in alarms),
    }


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    console = Console(width=140)
    if "frontier" in found:
        console.print(f"margin against the bisected frontier: {found['frontier']}", highlight=False)
    if "runs" not in found:
        return
    console.print(
        f"{found['runs']} runs: {found['collapses']} collapses, {found['survivors']} survivors",
        highlight=False,
    )
    table = Table(title="Thresholds from one half, judged on the other", title_justify="left")
    columns = (
        "precursor",
        "allowed / 1,000",
        "false / 1,000",
        "recall",
        "precision",
        "lead",
        "ms a measurement",
    )
    for column in columns:
        table.add_column(column)
    for name, of in found["table"].items():
        precursor, _, rate = name.rpartition(" @ ")
        cost = found["milliseconds"].get(precursor.partition(",")[0])
        table.add_row(
            precursor,
            rate,
            f"{of['false per 1,000 steps']:.1f}",
            _share(*of["recall"]),
            _share(*of["precision"]),
            "" if of["lead"] is None else f"{of['lead']:g}",
            "" if cost is None else f"{cost:.2f}",
        )
    console.print(table)
    causes = Table(
        "precursor", *CAUSES, title="Recall by what grew, at the larger rate", title_justify="left"
    )
    for name in ALL:
        of = found["table"][f"{name} @ {max(RATES):g}"]["recall by cause"]
        causes.add_row(name, *(_share(*of[cause]) if cause in of else "" for cause in CAUSES))
    console.print(causes)
    console.print(f"at-risk: {found['at-risk']}", highlight=False)
    for name, of in found.get("real norms", {}).items():
        console.print(f"{name}: {of}", highlight=False)


def _share(right: int, of: int) -> str:
    if not of:
        return ""
    low, high = binomtest(right, of).proportion_ci()
    return f"{right / of:.2f} ({right}/{of}; {low:.2f} to {high:.2f})"

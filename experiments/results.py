"""Reads a suite's folder or a study's file into one shape: numbers by metric, arm and seed, verdicts, and which runs broke.

A run *survived* a rate if it did not end in a collapse (``experiments.trial.collapse_onset``, or ended early as lost). The
*frontier* of an arm and a seed is log2 of the largest rate up to which it survived all; one octave below the lowest if it survived
none. A suite with rates measures everything else at its lowest rate, which all arms should bear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiments.arm import Arm, Suite
from experiments.execution.runner import jobs_of
from experiments.metrics import METRICS, Metric, measure
from experiments.program import program
from experiments.study import Outcome, Study, values_of
from experiments.study import judged as judged_study
from experiments.trial import collapse_onset
from experiments.verdicts import Claim, SeedValues, Verdict, judge_all
from stabilitylab.errors import InputError
from stabilitylab.runs import Run, load_run

FRONTIER = "frontier"
FRONTIER_OUTCOME = Outcome(title="Largest rate survived, log2", margin=0.5, unit="octaves", scale="rank")


@dataclass(frozen=True, kw_only=True)
class Made:
    """One run of a suite.

    Attributes:
        rate: log2 of its peak rate; None: the suite has no rates.
        broke: the step at which its collapse began; None: it survived.
        length: steps made.
    """

    arm: str
    seed: int
    rate: float | None
    run: Run
    broke: int | None
    length: int


@dataclass(frozen=True, kw_only=True)
class Results:
    """A question, and its runs' results.

    Attributes:
        values: ``values[metric][arm][seed]``.
        outcomes: definition of each metric.
        verdicts: on every claim, and whether each holds among all of them.
        alive: arm -> log2 rate -> how many seeds survived it, of how many; empty without a search for rates.
        runs: of a suite; a study keeps none.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    values: SeedValues
    outcomes: Mapping[str, Metric | Outcome]
    verdicts: list[Verdict]
    alive: Mapping[str, Mapping[float, tuple[int, int]]]
    runs: list[Made] = field(default_factory=list)

    @property
    def seeds(self) -> int:
        """The number of seeds in any arm."""
        return len(
            {seed for by_arm in self.values.values() for by_seed in by_arm.values() for seed in by_seed}
        )

    @property
    def broken(self) -> list[Made]:
        """The collapsed runs."""
        return [made for made in self.runs if made.broke is not None]


def results_of(asked: Suite | Study, out: Path) -> Results:
    """Read the results. Raises InputError if there are none."""
    return _of_study(asked, out) if isinstance(asked, Study) else _of_suite(asked, out)


def load_runs(suite: Suite, out: Path) -> list[Made]:
    """The suite's complete runs. Raises InputError if there is none."""
    found = []
    for job in jobs_of(suite, out):
        if job.is_complete():
            run = load_run(job.out)
            loss = run.series("train/-/loss").to_numpy(dtype=np.float64)
            lost = any(event.kind == "run-end" and event.data.get("lost") for event in run.events)
            broke = collapse_onset(loss, ended=lost)
            found.append(
                Made(arm=job.arm.name, seed=job.seed, rate=job.rate, run=run, broke=broke, length=len(loss))
            )
    if not found:
        raise InputError(f"{out} holds no complete run of {suite.name}: first run it ({program()} run)")
    return found


def _of_suite(suite: Suite, out: Path) -> Results:
    runs = load_runs(suite, out)
    lowest = min(suite.rates, default=None)
    chosen: dict[str, dict[int, Run]] = {}
    for made in runs:
        if made.rate == lowest:
            chosen.setdefault(made.arm, {})[made.seed] = made.run
    values: dict[str, Mapping[str, Mapping[int, float]]] = dict(measure(chosen))
    outcomes: dict[str, Metric | Outcome] = dict(METRICS)
    if suite.rates:
        values[FRONTIER] = frontiers(runs, suite.rates)
        outcomes[FRONTIER] = FRONTIER_OUTCOME
    verdicts = judge_all(suite.claims, values, outcomes)
    alive: dict[str, dict[float, tuple[int, int]]] = {}
    for made in runs:
        if made.rate is not None:
            lived, of = alive.setdefault(made.arm, {}).get(made.rate, (0, 0))
            alive[made.arm][made.rate] = (lived + (made.broke is None), of + 1)
    return Results(
        name=suite.name,
        question=suite.question,
        arms=suite.arms,
        claims=suite.claims,
        values=values,
        outcomes=outcomes,
        verdicts=verdicts,
        alive=alive,
        runs=runs,
    )


def frontiers(runs: list[Made], rates: tuple[float, ...]) -> dict[str, dict[int, float]]:
    """``frontiers[arm][seed]``, for seeds with a run at every rate."""
    lived: dict[tuple[str, int], dict[float, bool]] = {}
    for made in runs:
        if made.rate is not None:
            lived.setdefault((made.arm, made.seed), {})[made.rate] = made.broke is None
    found: dict[str, dict[int, float]] = {}
    for (arm, seed), by_rate in lived.items():
        if set(by_rate) == set(rates):
            borne = float(min(rates)) - 1.0
            for rate in sorted(rates):
                if not by_rate[rate]:
                    break
                borne = float(rate)
            found.setdefault(arm, {})[seed] = borne
    return found


def _of_study(study: Study, out: Path) -> Results:
    values = values_of(out)
    if not values:
        raise InputError(f"{out} holds no values of {study.name}: first run it ({program()} run)")
    borne = values.get(FRONTIER, {})
    rates = sorted({rate for by_seed in borne.values() for rate in by_seed.values()})
    alive = {
        arm: {rate: (sum(found >= rate for found in by_seed.values()), len(by_seed)) for rate in rates}
        for arm, by_seed in borne.items()
    }
    return Results(
        name=study.name,
        question=study.question,
        arms=study.arms,
        claims=study.claims,
        values=values,
        outcomes=study.outcomes,
        verdicts=judged_study(study, out),
        alive=alive,
    )

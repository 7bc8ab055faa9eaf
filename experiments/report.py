"""A suite's report: what was asked, the verdicts, the metrics by seed, and the figures a person looks at first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch

from experiments.arm import Suite
from experiments.metrics import METRICS, Metric, measure
from experiments.runner import jobs_of
from experiments.verdicts import Values, Verdict, judge_all, words
from stabilitylab.errors import InputError
from stabilitylab.report import Cell, Page, Section, Table
from stabilitylab.report import sections as shown
from stabilitylab.runs import Run, load_run


def write_report(suite: Suite, out: Path) -> Path:
    """Write ``report.html`` into the suite's folder from the runs that are there. Raises InputError if none is."""
    runs = load_runs(suite, out)
    values = measure(runs)
    page = Page(title=f"{suite.name}: {len(suite.arms)} arms, {len(suite.seeds)} seeds", lead=suite.question)
    page.facts = facts(suite, runs)
    page.sections += [arms_section(suite), verdict_section(suite, values), metric_section(suite, values)]
    by_label = {arm: list(by_seed.values()) for arm, by_seed in runs.items()}
    page.sections += [
        shown.overview(by_label),
        shown.episode_section(by_label),
        shown.gradients(by_label),
        shown.residual_stream(by_label),
        shown.attention(by_label),
        shown.outliers(by_label),
        commands_section(suite),
    ]
    return page.write(out / "report.html")


def load_runs(suite: Suite, out: Path) -> dict[str, dict[int, Run]]:
    """The suite's complete runs, by arm and seed."""
    runs: dict[str, dict[int, Run]] = {arm.name: {} for arm in suite.arms}
    for job in jobs_of(suite, out):
        if job.is_complete():
            runs[job.arm.name][job.seed] = load_run(job.out)
    if not any(runs.values()):
        raise InputError(
            f"{out} holds no complete run of {suite.name}: first python -m experiments run {suite.name}"
        )
    return {arm: by_seed for arm, by_seed in runs.items() if by_seed}


def facts(suite: Suite, runs: Mapping[str, Mapping[int, Run]]) -> dict[str, str]:
    """Small print: what was run, where, when."""
    complete = sum(len(by_seed) for by_seed in runs.values())
    config = next(iter(next(iter(runs.values())).values())).config
    return {
        "runs": f"{complete} of {len(suite.arms) * len(suite.seeds)} complete",
        "steps": str(config.get("steps")),
        "seeds": ", ".join(map(str, suite.seeds)),
        "preset": suite.preset,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def arms_section(suite: Suite) -> Section:
    rows = [
        [arm.name, arm.summary, " ".join(f"--{k} {v}" for k, v in arm.settings.items())] for arm in suite.arms
    ]
    common = " ".join(f"--{k} {v}" for k, v in suite.settings.items())
    return Section(
        title="Arms",
        text=(f"All share: {common}.",),
        parts=[Table(columns=["arm", "what", "settings"], rows=rows)],
    )


def verdict_section(suite: Suite, values: Values) -> Section:
    verdicts = judge_suite(suite, values)
    rows: list[list[Cell | str]] = [
        [
            verdict.claim.text,
            Cell(
                text=words(verdict.decision) + ("" if verdict.holds else "; not among all claims together"),
                detail=f"after {verdict.claim.source}",
            ),
            _pair(verdict),
            _difference(verdict),
        ]
        for verdict in verdicts
    ]
    return Section(
        title="Verdicts",
        text=(
            "A claim is supported, or against, when the seeds rule out no difference at 5 %, however often one has looked; "
            "equivalent when all that is left of a difference is smaller than what matters; undecided otherwise. Evidence is an "
            f"e-value: 20 decides. Of {len(suite.claims)} claims without any effect {0.05 * len(suite.claims):.1f} false verdicts "
            "would be expected at most; those that do not hold among all together (Holm) are marked.",
        ),
        parts=[Table(columns=["claim", "verdict", "arm / baseline", "effect, 95 % interval"], rows=rows)],
    )


def judge_suite(suite: Suite, values: Values) -> list[Verdict]:
    """Every claim of a suite, and whether it holds among all of them."""
    return judge_all(suite.claims, values, METRICS)


def metric_section(suite: Suite, values: Values) -> Section:
    """One row a metric, one column an arm: mean, with the seeds' values below."""
    arms = [arm.name for arm in suite.arms if any(arm.name in by_arm for by_arm in values.values())]
    rows: list[list[Cell | str]] = []
    for name, metric in METRICS.items():
        means = {arm: _mean(values[name].get(arm, {})) for arm in arms}
        if not metric.everywhere and all(math.isnan(mean) for mean in means.values()):
            continue
        best = _best(means, metric)
        rows.append(
            [
                metric.title + (f", {metric.unit}" if metric.unit else ""),
                *(
                    Cell(
                        text=_number(means[arm], metric),
                        best=arm in best,
                        detail=_seeds(values[name].get(arm, {}), metric),
                    )
                    for arm in arms
                ),
            ]
        )
    note = "Large: mean over seeds. Small: each seed. Shaded: the stable end of the row, where one arm stands alone there."
    return Section(title="Metrics", parts=[Table(columns=["metric", *arms], rows=rows, note=note)])


def commands_section(suite: Suite) -> Section:
    """How to repeat each arm by hand."""
    lines = tuple(
        "glm " + " ".join(suite.command(arm, suite.seeds[0], data=Path("DATA"), out=Path("RUN")))
        for arm in suite.arms
    )
    return Section(title="Repeat a run", text=lines)


def _mean(by_seed: Mapping[int, float]) -> float:
    return sum(by_seed.values()) / len(by_seed) if by_seed else math.nan


def _best(means: Mapping[str, float], metric: Metric) -> set[str]:
    finite = {arm: value for arm, value in means.items() if math.isfinite(value)}
    if metric.better is None or not finite:
        return set()
    edge = min(finite.values()) if metric.better == "less" else max(finite.values())
    arms = {arm for arm, value in finite.items() if value == edge}
    return arms if len(arms) == 1 else set()


def _number(value: float, metric: Metric) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{metric.digits}g}"


def _seeds(by_seed: Mapping[int, float], metric: Metric) -> str:
    return " · ".join(_number(value, metric) for value in by_seed.values())


def _pair(verdict: Verdict) -> Cell:
    metric = METRICS[verdict.claim.metric]
    sides = [_number(_mean(v), metric) for v in (verdict.arm_values, verdict.baseline_values)]
    return Cell(text=" / ".join(sides), detail=metric.title)


def _difference(verdict: Verdict) -> str:
    decision = verdict.decision
    if not decision.n:
        return "no shared seeds"
    return f"{decision.effect:+.3g} [{decision.low:+.3g}, {decision.high:+.3g}], e = {decision.e_value:.2g}"

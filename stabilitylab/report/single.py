"""The report of one run, and of several beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from stabilitylab.report import sections
from stabilitylab.report.page import Page
from stabilitylab.runs.run import Run


def run_report(run: Run) -> Page:
    """Everything a person looks at first about one run."""
    return _report({run.name: [run]}, title=f"Run {run.name}", lead=_lead(run), facts=_facts(run))


def comparison(runs: Sequence[Run]) -> Page:
    """Several runs over each other, each under its folder's name."""
    labels = {run.name if len({r.name for r in runs}) == len(runs) else str(run.path): [run] for run in runs}
    return _report(labels, title="Comparison of " + ", ".join(labels), lead="", facts={})


def _report(runs: sections.Runs, *, title: str, lead: str, facts: dict[str, str]) -> Page:
    page = Page(title=title, lead=lead, facts=facts)
    page.sections += [
        sections.overview(runs),
        sections.episode_section(runs),
        sections.diagnosis_section(runs),
        sections.gradients(runs),
        sections.residual_stream(runs),
        sections.attention(runs),
        sections.ranges(runs),
        sections.updates(runs),
        sections.outliers(runs),
    ]
    return page


def _lead(run: Run) -> str:
    loss = run.series("train/-/loss")
    if loss.empty:
        return "This run recorded no loss."
    steps = f"{len(loss):,} steps recorded, {loss.index[0]} to {loss.index[-1]}"
    return f"{steps}; the loss went from {loss.iloc[0]:.4g} to {loss.iloc[-1]:.4g} nats."


def _facts(run: Run) -> dict[str, str]:
    facts = {"folder": str(run.path)}
    for name in ("preset", "precision", "steps", "seed"):
        if (value := run.config.get(name)) not in (None, ""):
            facts[name] = str(value)
    model: Any = run.config.get("model", {})
    if isinstance(model, dict) and "layers" in model:
        facts["model"] = f"{model['layers']} layers of {model.get('hidden')}, norm {model.get('norm')}"
    if run.events:
        facts["last event"] = datetime.fromtimestamp(run.events[-1].time).strftime("%Y-%m-%d %H:%M")
    return facts

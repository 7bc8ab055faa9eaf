"""Sections that tell what happened to runs: their curves, the episodes in them, and why those began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stabilitylab.charts.curves import curves
from stabilitylab.charts.look import Chart
from stabilitylab.figures.curves import Mark
from stabilitylab.figures.style import plain
from stabilitylab.report.page import Cell, Section, Table
from stabilitylab.runs.run import Run
from stabilitylab.spikes import KINDS, episodes_of

Runs = Mapping[str, Sequence[Run]]
MOST_ROWS = 200


def overview(runs: Runs) -> Section:
    """Loss and gradient norm with their episodes marked, loss scale and learning rate."""
    parts = [
        _curve(runs, "train/-/loss", "Loss", unit="nats", log="auto", marked=True),
        _curve(runs, "train/-/gradient_norm", _norm_title(runs), log=True, marked=True),
        _curve(runs, "precision/-/loss_scale", "Loss scale", log=True, base=2, stairs=True),
        _curve(runs, "train/-/learning_rate", "Learning rate"),
    ]
    seeds = any(len(several) > 1 for several in runs.values())
    text = "A triangle marks where the detector saw an episode begin; it is shaded for as long as it lasts."
    if seeds:
        text += " Thin lines are single seeds, the thick one their mean."
    return Section(
        title="Loss and gradient norm", text=(text,), parts=[part for part in parts if part is not None]
    )


def _norm_title(runs: Runs) -> str:
    by_hand = any(
        event.kind == "gradients-changed" for several in runs.values() for r in several for event in r.events
    )
    return "Gradient norm, after clipping by hand" if by_hand else "Gradient norm, before clipping"


def episode_section(runs: Runs) -> Section:
    """Every episode that the detector reported."""
    rows: list[Sequence[Cell | str]] = []
    for label, several in runs.items():
        for run in several:
            for episode in episodes_of(run.events):
                height = (
                    "–"
                    if episode.height is None or not np.isfinite(episode.height)
                    else plain(_round(episode.height))
                )
                name = run.name if len(several) > 1 or label != run.name else label
                end = "open" if episode.end is None else str(episode.end)
                rows.append(
                    [name, episode.kind, str(episode.onset), str(episode.peak), end, height, episode.signal]
                )
    if not rows:
        return Section(title="Episodes", text=("The detector saw no spike, divergence or other episode.",))
    count = f"The detector saw {len(rows)} episode{'s' if len(rows) > 1 else ''}."
    if len(rows) > MOST_ROWS:
        count += f" The first {MOST_ROWS} are listed; events.jsonl has all."
    note = "Height is over the signal's own baseline: nats for a loss, natural log for a norm, log2 for a loss scale."
    columns = ["run", "kind", "onset", "peak", "end", "height", "signal"]
    return Section(
        title="Episodes", text=(count,), parts=[Table(columns=columns, rows=rows[:MOST_ROWS], note=note)]
    )


def diagnosis_section(runs: Runs) -> Section:
    """Why each episode happened, as far as the telemetry tells."""
    rows: list[Sequence[Cell | str]] = []
    for several in runs.values():
        for run in several:
            for step, cause, sentences in _diagnoses(run):
                rows.append([run.name, str(step), cause, " ".join(sentences)])
    if not rows:
        return Section(title="Causes", text=("There is nothing to explain.",))
    note = "What is close in time is not thereby the cause; the table of causes stands in stabilitylab/spikes/forensics.py."
    return Section(
        title="Causes",
        text=("Which site left its own baseline first, around each episode, and what that suggests.",),
        parts=[Table(columns=["run", "step", "suspect", "what was seen"], rows=rows, note=note)],
    )


def _diagnoses(run: Run) -> list[tuple[int, str, Sequence[str]]]:
    """Step, cause and sentences: as the run recorded them, else made now (the run was killed, or is going on)."""
    recorded = [event for event in run.events if event.kind == "diagnosis"]
    if recorded:
        from stabilitylab.spikes.advice import told_now

        return [(event.step, str(event.data["cause"]), told_now(run, event.data)) for event in recorded]
    from stabilitylab.spikes.forensics import diagnose_run  # forensics reads runs, so it knows this package

    return [(one.episode.onset, one.cause, one.sentences) for one in diagnose_run(run)]


def _curve(
    runs: Runs, metric: str, title: str, *, unit: str = "", marked: bool = False, **look: object
) -> Chart | None:
    lines = {label: [run.series(metric) for run in several] for label, several in runs.items()}
    if not any(len(series) for several in lines.values() for series in several):
        return None
    marks = {label: marks_of(several, metric) for label, several in runs.items()} if marked else {}
    names = {label: [run.name for run in several] for label, several in runs.items()}
    return curves(lines, title=title, unit=unit, marks=marks, names=names, **look)  # type: ignore[arg-type]


def marks_of(several: Sequence[Run], metric: str) -> list[Mark]:
    """The runs' episodes on one signal, the highest ones where there are very many."""
    shown = [e for run in several for e in episodes_of(run.events) if e.signal == metric and e.kind in KINDS]
    shown.sort(key=lambda e: -(e.height or np.inf))
    return [Mark(e.onset, e.end, e.kind) for e in shown[:40]]


def _round(value: float) -> float:
    return float(f"{value:.3g}")

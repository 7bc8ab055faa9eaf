"""Sections that tell what happened to runs: their curves, the episodes in them, and why those began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from stabilitylab.charts.curves import curves
from stabilitylab.charts.look import Chart
from stabilitylab.figures.lines import Mark
from stabilitylab.figures.numbers import plain
from stabilitylab.report.page import Said, Section, Statements, Table, TableCell
from stabilitylab.report.run_labels import Runs, labelled
from stabilitylab.runs.run import Run
from stabilitylab.spikes import KINDS, Episode, episodes_of
from stabilitylab.spikes.forensics import diagnose_run
from stabilitylab.telemetry import GRADIENT_NORM, LOSS

MOST_ROWS = 200
MOST_TOLD = 6
# How sentences about documents begin: they are long, and for readers who look for them.
BATCH = "Batch of step "
STATES, GRAVEST = ("spike", "divergence"), ("non-finite", "divergence", "dead", "spike")
_NOUNS = {
    "non-finite": ("stretch that is not finite", "stretches that are not finite"),
    "divergence": ("divergence", "divergences"),
    "dead": ("dead loss", "dead losses"),
    "spike": ("spike", "spikes"),
    "frozen": ("frozen loss", "frozen losses"),
    "loss-scale-collapse": ("collapse of the loss scale", "collapses of the loss scale"),
    "hard-batch": ("hard batch", "hard batches"),
}
AFTER = 64  # values after an episode, whose level is the one that the loss came back to
_LONG = {LOSS: "The loss", GRADIENT_NORM: "The gradient norm"}


def overview(runs: Runs) -> Section:
    """Loss and gradient norm with their episodes marked, loss scale and learning rate."""
    units = {run.loss_unit for several in runs.values() for run in several}
    unit = units.pop() if len(units) == 1 else ""
    parts = [
        _curve(runs, "train/-/loss", "Loss", unit=unit, log="auto", marked=True),
        _curve(runs, "train/-/gradient_norm", _norm_title(runs), log=True, marked=True),
        _curve(runs, "precision/-/loss_scale", "Loss scale", log=True, base=2, stairs=True),
        _curve(runs, "train/-/learning_rate", "Learning rate"),
    ]
    seeds = any(len(several) > 1 for several in runs.values())
    text = "A triangle marks where the detector saw an episode begin; it is shaded for as long as it lasts. Crosses: not finite."
    if seeds:
        text += " Thin lines are single seeds, the thick one their mean."
    return Section(
        title="Loss and gradient norm", text=(text,), parts=[part for part in parts if part is not None]
    )


def _norm_title(runs: Runs) -> str:
    by_hand = any(
        event.kind == "gradients-changed" for several in runs.values() for r in several for event in r.events
    )
    if any(run.kind == "log" for several in runs.values() for run in several):
        return "Gradient norm"  # before or after clipping: it does not say
    return "Gradient norm, after clipping by hand" if by_hand else "Gradient norm, before clipping"


def episode_section(runs: Runs) -> Section:
    """Every episode that the detector reported."""
    rows: list[Sequence[TableCell | str]] = []
    for name, run in labelled(runs):
        for episode in episodes_of(run.events):
            height = (
                "–"
                if episode.height is None or not np.isfinite(episode.height)
                else plain(_round(episode.height))
            )
            end = "open" if episode.end is None or episode.to_the_end else str(episode.end)
            rows.append(
                [name, episode.kind, str(episode.onset), str(episode.peak), end, height, episode.signal]
            )
    if not rows:
        return Section(title="Episodes", text=("The detector saw no spike, divergence or other episode.",))
    count = f"The detector saw {len(rows)} episode{'s' if len(rows) > 1 else ''}."
    if len(rows) > MOST_ROWS:
        count += f" The first {MOST_ROWS} are listed; events.jsonl has all."
    note = "Height is over the signal's own baseline: in its unit for a loss, natural log for a norm, log2 for a loss scale."
    columns = ["run", "kind", "onset", "peak", "end", "height", "signal"]
    return Section(
        title="Episodes", text=(count,), parts=[Table(columns=columns, rows=rows[:MOST_ROWS], note=note)]
    )


def key_message(run: Run) -> Section:
    """What happened, where it began and what to try: the gravest episodes, in the order in which they came."""
    kinds = [event for event in run.events if event.kind in KINDS]
    if kinds and run.kind == "log":
        return Section(title="What happened", parts=[_of_a_log(run)])
    found = diagnoses(run)
    if not found:
        said = Said(
            word="calm", text="No spike, no divergence, nothing that is not finite was found.", tone="good"
        )
        if kinds:
            said = Said(
                word=kinds[0].kind, text=f"From step {kinds[0].step} on; nothing explains it.", tone="bad"
            )
        return Section(title="What happened", parts=[Statements(said=[said])])
    said_all = []
    loss = run.series(LOSS)
    ended = {
        (one.kind, one.onset): outcome(one, loss) for one in episodes_of(run.events) if one.signal == LOSS
    }
    for data in _gravest(found):
        first, *seen = data["sentences"]
        plain_seen = [s for s in seen if not s.startswith((BATCH, "Try: "))]
        advice = str(data.get("advice") or "")
        kind = str(data["episode"]["kind"])
        became = ended.get((kind, data["episode"]["onset"]), "")
        said_all.append(
            Said(
                word=kind.replace("-", " "),
                text="S" + str(first).removeprefix(f"{kind} at s"),
                detail=" ".join(filter(None, [became, *plain_seen[:2], advice])),
                tone="open" if kind == "hard-batch" else "bad",
            )
        )
    note = f"The gravest of {len(found)}; all stand under Causes." if len(found) > len(said_all) else ""
    return Section(title="What happened", parts=[Statements(said=said_all, note=note)])


def outcome(one: Episode, loss: pd.Series[float]) -> str:
    """What became of the loss: "From 2.13 up to 6.68; it stayed there, 6.63 after step 96,310." Nothing for a batch or two."""
    if one.kind not in STATES or one.level is None or one.height is None or not np.isfinite(one.height):
        return ""
    said = f"From {one.level:.4g} up to {one.level + one.height:.4g}"
    if one.end is None:
        return f"{said}, and going on."
    if one.to_the_end:
        return f"{said}, and not over when the run ended."
    after = loss.loc[one.end + 1 :].iloc[:AFTER]
    after = after[np.isfinite(after)]
    if len(after) < 4:
        return f"{said}, until step {one.end:,}."
    level = float(after.median())
    if level - one.level > 0.5 * one.height:
        return f"{said}; it stayed there, at {level:.4g} from step {one.end:,} on."
    return f"{said}; over at step {one.end:,}, then {level:.4g}."


def counted(episodes: Sequence[Episode]) -> str:
    """ "1 divergence, 2 spikes, 1 hard batch", the gravest first; empty where there is none."""
    kinds = Counter(one.kind for one in episodes)
    order = dict.fromkeys(kind for kind in (*GRAVEST, *KINDS) if kind in kinds)
    return ", ".join(f"{kinds[kind]} {_NOUNS.get(kind, (kind, kind))[kinds[kind] > 1]}" for kind in order)


def _of_a_log(run: Run) -> Statements:
    """The episodes that a log shows; it does not tell why they came."""
    found = episodes_of(run.events)
    bad = [one for one in found if one.kind != "hard-batch"] or found
    said = [
        Said(
            word=one.kind.replace("-", " "),
            text=f"{_LONG.get(one.signal, one.signal)}, "
            + (
                f"from step {one.onset} on."
                if one.end is None or one.to_the_end
                else f"steps {one.onset} to {one.end}."
            ),
            detail=" ".join(
                [
                    *(
                        [f"{one.height:.3g} over its level of {one.level:.4g}."]
                        if one.height and one.level
                        else []
                    ),
                    *([f"{one.reason[:1].upper()}{one.reason[1:]}."] if one.reason else []),
                ]
            ),
            tone="open" if one.kind == "hard-batch" else "bad",
        )
        for one in bad[:MOST_TOLD]
    ]
    more = f"{len(found) - len(said)} more stand below. " if len(found) > len(said) else ""
    return Statements(
        said=said, note=more + "A log does not tell why; a monitored run does (docs/attach.md)."
    )


def _gravest(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Episodes before departures that no episode shows, the first of a kind and cause before its likes; then by step."""
    told: Counter[tuple[str, str]] = Counter()
    ranked: list[tuple[bool, bool, int, int, Mapping[str, Any]]] = []
    for data in found:
        kind = str(data["episode"]["kind"])
        like = (kind, str(data["cause"]))
        ranked.append((kind not in KINDS, kind == "hard-batch", told[like], len(ranked), data))
        told[like] += 1
    return sorted(
        (data for *_, data in sorted(ranked, key=lambda one: one[:4])[:MOST_TOLD]),
        key=lambda data: data["episode"]["onset"],
    )


def diagnosis_section(runs: Runs) -> Section:
    """Why each episode happened, as far as the telemetry tells."""
    rows: list[Sequence[TableCell | str]] = []
    for name, run in labelled(runs):
        for data in diagnoses(run):
            batches = [s for s in data["sentences"] if s.startswith(BATCH)]
            seen = [s for s in data["sentences"] if not s.startswith(BATCH)]
            rows.append(
                [
                    name,
                    str(data["episode"]["onset"]),
                    str(data["cause"]),
                    TableCell(text=" ".join(seen), detail=" ".join(batches)),
                ]
            )
    if not rows:
        return Section(title="Causes", text=("There is nothing to explain.",))
    count = ""
    if len(rows) > MOST_ROWS:
        count = f" The first {MOST_ROWS} of {len(rows)}; events.jsonl has all."
    note = (
        "Proximity in time does not prove a cause; the table of causes is in stabilitylab/spikes/suspects.py."
    )
    return Section(
        title="Causes",
        text=(
            "Which site left its own baseline first, around each episode, and what that suggests." + count,
        ),
        parts=[Table(columns=["run", "step", "suspect", "what was seen"], rows=rows[:MOST_ROWS], note=note)],
    )


def diagnoses(run: Run) -> list[Mapping[str, Any]]:
    """Each diagnosis as ``Diagnosis.to_json`` gives it: as the run recorded it, else made now (it was killed, or is going on)."""
    recorded = [event.data for event in run.events if event.kind == "diagnosis"]
    if recorded:
        return recorded
    return [one.to_json() for one in diagnose_run(run)]


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

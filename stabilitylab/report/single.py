"""The report of one run, and of several beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from stabilitylab.report import sections
from stabilitylab.report.attribution_section import attribution_section
from stabilitylab.report.close_ups import close_ups, course
from stabilitylab.report.episodes_section import GRAVEST, counted
from stabilitylab.report.formats_section import formats_section
from stabilitylab.report.page import Page, Said, Section, Statements, Table
from stabilitylab.runs.config import flat
from stabilitylab.runs.run import Run
from stabilitylab.spikes import episodes_of

_NONE = object()


def run_report(run: Run) -> Page:
    """Everything a person looks at first about one run."""
    page = _report({run.name: [run]}, title=f"Run {run.name}", lead=_lead(run), facts=_facts(run))
    if (proven := attribution_section(run)) is not None:
        page.sections.insert(3, proven)  # after the diagnoses
    page.sections.insert(0, sections.key_message(run))
    if (near := close_ups(run)) is not None:
        page.sections.insert(1, near)
    if (formats := formats_section(run)) is not None:
        page.sections.append(formats)
    return page


def comparison(runs: Sequence[Run]) -> Page:
    """Several runs over each other, each under its name, or under its path where names coincide."""
    labels = {run.name if len({r.name for r in runs}) == len(runs) else str(run.path): [run] for run in runs}
    page = _report(labels, title="Comparison of " + ", ".join(labels), lead="", facts={})
    first = _outcomes({label: run for label, (run,) in labels.items()})
    settings = _settings({label: run for label, (run,) in labels.items()})
    page.sections[:0] = [first] if all(run.kind == "log" for run in runs) else [first, settings]
    return page


def _outcomes(runs: Mapping[str, Run]) -> Section:
    """How each run went, in a sentence, and what its diagnosis suspects of the gravest episode."""
    said = []
    for label, run in runs.items():
        found = sections.diagnoses(run) if run.kind == "folder" else []
        # Of several the gravest: a hard batch that came first says nothing of the divergence that ended the run.
        gravest = min(found, key=_gravity)["sentences"][0] if found else ""
        first = f" {gravest[0].upper()}{gravest[1:]}" if gravest else ""
        episodes = len(episodes_of(run.events))
        said.append(
            Said(
                word=f"{episodes} episode{'' if episodes == 1 else 's'}" if episodes else "calm",
                text=label,
                detail=_lead(run) + first,
                tone="bad" if episodes else "good",
            )
        )
    return Section(title="What happened", parts=[Statements(said=said)])


def _gravity(diagnosis: Mapping[str, Any]) -> int:
    kind = diagnosis["episode"]["kind"]
    return GRAVEST.index(kind) if kind in GRAVEST else len(GRAVEST) + (kind == "hard-batch")


def _settings(runs: Mapping[str, Run]) -> Section:
    """Which settings differ, so that a difference between curves has a name."""
    settings = {label: flat(run.config) for label, run in runs.items()}
    if not any(settings.values()):
        return Section(title="Settings that differ", text=("None of the runs holds a config.json.",))
    names = list(dict.fromkeys(name for one in settings.values() for name in one))
    rows = [
        [name, *(str(one[name]) if name in one else "–" for one in settings.values())]
        for name in names
        if len({repr(one.get(name, _NONE)) for one in settings.values()}) > 1
    ]
    if not rows:
        return Section(title="Settings that differ", text=("All settings are equal.",))
    return Section(title="Settings that differ", parts=[Table(columns=["setting", *settings], rows=rows)])


def _report(runs: sections.Runs, *, title: str, lead: str, facts: dict[str, str]) -> Page:
    page = Page(title=title, lead=lead, facts=facts)
    page.sections += [sections.overview(runs), sections.episode_section(runs)]
    if all(run.kind == "log" for several in runs.values() for run in several):
        return page  # a log tells nothing of layers
    page.sections += [
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
    happened = counted(episodes_of(run.events))
    several = len(loss) > 1
    steps = (
        f"{len(loss):,} steps recorded, {loss.index[0]} to {loss.index[-1]}" if several else "1 step recorded"
    )
    before = f"{happened}. " if happened else ""
    return f"{before}{steps}; {course(loss, run.loss_unit)}."


def _facts(run: Run) -> dict[str, str]:
    facts = {run.kind: str(run.path)}
    for name in ("preset", "precision", "steps", "seed"):
        if (value := run.config.get(name)) not in (None, ""):
            facts[name] = str(value)
    model: Any = run.config.get("model", {})
    if isinstance(model, dict) and "layers" in model:
        norm = f", norm {model['norm']}" if model.get("norm") else ""
        facts["model"] = f"{model['layers']} layers of {model.get('hidden')}{norm}"
    if run.events and run.kind == "folder":
        facts["last event"] = datetime.fromtimestamp(run.events[-1].time).strftime("%Y-%m-%d %H:%M")
    return facts

"""What every report shows of runs: curves, episodes, layer maps, ranges. Runs come as label -> its runs (one a seed)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from stabilitylab.report import figures
from stabilitylab.report.page import Cell, Picture, Section, Table
from stabilitylab.report.run import Run
from stabilitylab.spikes import KINDS, Episode, episodes_of

Runs = Mapping[str, Sequence[Run]]

FP16_LIMIT = (figures.FP16_MAX, "largest fp16 number, 65,504")
_BLOCK = re.compile(r"^(?:.*\.)?(\d+)$")


def overview(runs: Runs) -> Section:
    """Loss and gradient norm with their episodes marked, learning rate and loss scale."""
    parts = [
        _curve(runs, "train/-/loss", "Loss", unit="nats", marked=True),
        _curve(runs, "train/-/gradient_norm", "Gradient norm, before clipping", log=True, marked=True),
        _curve(runs, "precision/-/loss_scale", "Loss scale", log=True),
        _curve(runs, "train/-/learning_rate", "Learning rate"),
    ]
    return Section(
        title="Loss and gradient norm",
        text=(
            "Triangles mark where the detector saw an episode begin. Thin lines are single seeds, the thick one their mean; "
            "crosses at the upper edge are values that are not finite.",
        ),
        parts=[part for part in parts if part is not None],
    )


def episode_section(runs: Runs) -> Section:
    """Every episode that the detector reported."""
    rows: list[Sequence[Cell | str]] = []
    for label, several in runs.items():
        for run in several:
            for episode in episodes_of(run.events):
                height = (
                    "–"
                    if episode.height is None or not np.isfinite(episode.height)
                    else f"{episode.height:.3g}"
                )
                name = run.name if len(several) > 1 or label != run.name else label
                end = "open" if episode.end is None else str(episode.end)
                rows.append(
                    [name, episode.kind, str(episode.onset), str(episode.peak), end, height, episode.signal]
                )
    if not rows:
        return Section(title="Episodes", text=("The detector saw no spike, divergence or other episode.",))
    columns = ["run", "kind", "onset", "peak", "end", "height", "signal"]
    note = "Height is over the signal's own baseline: nats for a loss, natural log for a norm."
    return Section(
        title="Episodes",
        text=(f"{len(rows)} episodes.",),
        parts=[Table(columns=columns, rows=rows, note=note)],
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
        return [(event.step, str(event.data["cause"]), event.data["sentences"]) for event in recorded]
    from stabilitylab.spikes.forensics import diagnose_run  # forensics reads runs, so it knows this package

    return [(one.episode.onset, one.cause, one.sentences) for one in diagnose_run(run)]


def main_branch(runs: Runs) -> Section:
    """The main branch by depth, and its maps over the steps."""
    parts: list[Table | Picture] = [
        Picture(
            figure=figures.by_layer(
                {
                    label: [block_values(run).max(axis=1) for run in several]
                    for label, several in runs.items()
                },
                title="Largest |value| on the main branch, over all measured steps",
                limit=FP16_LIMIT,
            ),
            caption="Each point is the output of one block. The distance to the dashed line is what fp16 has left.",
        )
    ]
    maps = {label: block_values(several[0]) for label, several in runs.items() if several}
    parts += _maps(maps, "Largest |value| on the main branch, layer by step")
    return Section(title="Main branch", parts=parts)


def attention(runs: Runs) -> Section:
    """Largest attention scores, over heads."""
    found: dict[str, list[pd.DataFrame]] = {
        label: [run.matrix("attention", "score_max", index="max") for run in several]
        for label, several in runs.items()
    }
    lines = {
        label: [matrix.max(axis=0, skipna=False) for matrix in several if matrix.size]
        for label, several in found.items()
    }
    parts: list[Table | Picture] = [
        Picture(
            figure=figures.curves(
                lines,
                title="Largest attention score, over layers and heads",
                log=_positive(lines),
                limit=FP16_LIMIT,
            )
        )
    ]
    parts += _maps(
        {label: several[0] for label, several in found.items() if several},
        "Largest score, layer by step",
        log=False,
    )
    return Section(
        title="Attention scores",
        text=(
            "Scores are what enters the softmax. Above 65,504 they overflow fp16; from about 1,000 on, training is in danger.",
        ),
        parts=parts,
    )


def gradients(runs: Runs) -> Section:
    """The embedding's share of the gradient, and where in the model the gradient is."""
    share = {
        label: [run.series(f"gradient/{site}/share") for run in several if (site := embedding_site(run))]
        for label, several in runs.items()
    }
    parts: list[Table | Picture] = [
        Picture(
            figure=figures.curves(
                share, title="The embedding's share of the squared gradient norm", unit="share"
            )
        )
    ]
    maps = {
        label: _per_layer(several[0].matrix("gradient", "l2")) for label, several in runs.items() if several
    }
    parts += _maps(maps, "Gradient norm, layer by step")
    return Section(title="Gradients", parts=parts)


def outliers(runs: Runs) -> Section:
    """The share of activation values that are outliers."""
    lines = {}
    for label, several in runs.items():
        matrices = [run.matrix("activation", "outlier_fraction") for run in several]
        lines[label] = [matrix.mean(axis=0) for matrix in matrices if matrix.size]
    figure = figures.curves(
        lines, title="Share of activation values with |x| >= 6, mean over sites", unit="share"
    )
    return Section(
        title="Activation outliers",
        text=("The criterion is LLM.int8()'s magnitude threshold alone; other criteria give other shares.",),
        parts=[Picture(figure=figure)],
    )


def block_values(run: Run, statistic: str = "absmax") -> pd.DataFrame:
    """A statistic of every block's output: rows the blocks by depth, columns the steps."""
    matrix = run.matrix("activation", statistic)
    blocks = {site: int(match[1]) for site in matrix.index if (match := _BLOCK.match(str(site)))}
    return matrix.loc[sorted(blocks, key=lambda site: blocks[site])]


def embedding_site(run: Run) -> str | None:
    """The parameter that is the token embedding, by its name; None where no name says so."""
    metrics = run.metrics
    sites = metrics.loc[(metrics["family"] == "gradient") & (metrics["statistic"] == "share"), "site"]
    named = [site for site in sites if re.search(r"embed|wte", site) and not re.search(r"pos|wpe|norm", site)]
    return named[0] if named else None


def _curve(
    runs: Runs, metric: str, title: str, *, unit: str = "", log: bool = False, marked: bool = False
) -> Picture | None:
    lines = {label: [run.series(metric) for run in several] for label, several in runs.items()}
    if not any(len(series) for several in lines.values() for series in several):
        return None
    marks = {label: _marks(several, metric) for label, several in runs.items()} if marked else {}
    return Picture(
        figure=figures.curves(lines, title=title, unit=unit, log=log and _positive(lines), marks=marks)
    )


def _marks(several: Sequence[Run], metric: str) -> list[tuple[int, str]]:
    episodes: list[Episode] = [episode for run in several for episode in episodes_of(run.events)]
    shown = [e for e in episodes if e.signal == metric and e.kind in KINDS]
    # More than a dozen labels in one picture cannot be read: the highest say the most.
    shown.sort(key=lambda e: -(e.height or 0.0))
    return [(e.onset, e.kind) for e in shown[:12]]


def _maps(matrices: Mapping[str, pd.DataFrame], title: str, *, log: bool = True) -> list[Picture]:
    """One map a label, on one colour scale."""
    values = [matrix.to_numpy(dtype=float).ravel() for matrix in matrices.values()]
    every = np.concatenate([np.empty(0), *values])
    every = every[np.isfinite(every) & ((every > 0) | (not log))]
    limits = (float(every.min()), float(every.max())) if every.size else None
    return [
        Picture(figure=figures.heat_map(matrix, title=f"{title}: {label}", log=log, limits=limits))
        for label, matrix in matrices.items()
        if matrix.size
    ]


def _per_layer(norms: pd.DataFrame) -> pd.DataFrame:
    """Per-parameter norms joined to one row a block (root of the sum of squares); what is in no block stays by itself."""
    names = [re.match(r"^(.*?\.\d+)\.", str(site)) for site in norms.index]
    groups = [match[1] if match else str(site) for match, site in zip(names, norms.index, strict=True)]
    order = list(dict.fromkeys(groups))
    return (norms**2).groupby(np.array(groups, dtype=object)).sum(min_count=1).pow(0.5).reindex(order)


def _positive(lines: Mapping[str, Sequence[pd.Series[float]]]) -> bool:
    """Whether a logarithmic axis can show the values."""
    finite = [s[np.isfinite(s)] for several in lines.values() for s in several]
    return all((s > 0).all() for s in finite) and any(len(s) for s in finite)

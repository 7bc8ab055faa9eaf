"""Sections that look into the model: gradients, residual stream, attention, ranges, updates and outliers by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from stabilitylab.charts.curves import by_depth, curves, layer_curves
from stabilitylab.charts.look import Chart
from stabilitylab.charts.maps import heat_map
from stabilitylab.figures.numbers import FP16_MAX, plain, positive
from stabilitylab.report.page import Section, Table
from stabilitylab.report.run_labels import Runs, labelled
from stabilitylab.runs.places import Places
from stabilitylab.runs.run import Run

TableOrChart = Table | Chart
RecordedGrid = tuple[pd.DataFrame, pd.DataFrame]  # values, and where they were recorded

FP16_LIMIT = (FP16_MAX, "largest fp16 number, 65,504")


def gradients(runs: Runs) -> Section:
    """The embedding's share of the gradient, and where in the model the gradient is."""
    share = {label: [_embedding_share(run) for run in several] for label, several in runs.items()}
    parts: list[TableOrChart] = []
    if any(len(series) for several in share.values() for series in several):
        chart = curves(share, title="The embedding's share of the squared gradient norm", unit="share")
        parts.append(chart)
    grids = {
        label: _per_layer(_grid(several[0], "gradient", "l2"), several[0].places)
        for label, several in runs.items()
        if several
    }
    parts += _maps(grids, "Gradient norm, layer by step")
    text = "Each row of a map is one block, with its parameters' norms combined; parameters outside all blocks have their own rows."
    return _section("Gradients", parts, text)


def residual_stream(runs: Runs) -> Section:
    """The residual stream by depth, and its maps over the steps."""
    grids = {label: [block_grid(run) for run in several] for label, several in runs.items()}
    peaks = {label: [_peak(grid) for grid in several if grid[0].size] for label, several in grids.items()}
    if not any(peaks.values()):
        return _section("Residual stream", [], "")
    chart = by_depth(
        peaks, title="Largest |value| on the residual stream, over all measured steps", limit=FP16_LIMIT
    )
    parts: list[TableOrChart] = [dataclasses.replace(chart, caption="Each point is the output of one block.")]
    parts += _maps(
        {label: several[0] for label, several in grids.items() if several}, "Largest |value|, layer by step"
    )
    return _section("Residual stream", parts, _headroom("value on the residual stream", peaks))


def attention(runs: Runs) -> Section:
    """Largest attention scores: over the steps, and of every head."""
    grids = {
        label: [_grid(run, "attention", "score_max") for run in several] for label, several in runs.items()
    }
    lines = {
        label: [_over_sites(grid) for grid in several if grid[0].size] for label, several in grids.items()
    }
    if not any(lines.values()):
        return _section("Attention scores", [], "")
    together = np.concatenate([s.to_numpy() for several in lines.values() for s in several])
    title = "Largest attention score, over layers and heads"
    chart = curves(lines, title=title, log=positive(together), limit=FP16_LIMIT)
    parts: list[TableOrChart] = [chart]
    if len(runs) == 1:
        (several,) = runs.values()
        heads = {"head": [head for run in several for head in _heads(run)]}
        title = "Largest score of every head, over all measured steps"
        chart = by_depth(heads, title=title, joined=False, limit=FP16_LIMIT)
        parts.append(dataclasses.replace(chart, caption="One dot a head."))
    maps = {label: several[0] for label, several in grids.items() if several}
    parts += _maps(maps, "Largest score, layer by step", log=False)
    text = "Scores are what enters the softmax; from about 1,000 on, training is in danger. "
    return _section("Attention scores", parts, text + _headroom("score", lines))


def ranges(runs: Runs, most: int = 12) -> Section:
    """The places of one run that come nearest to fp16's limit."""
    rows = []
    for name, run in labelled(runs):
        for family, statistic in (
            ("activation", "absmax"),
            ("attention", "score_max"),
            ("activation_gradient", "absmax"),
        ):
            values, known = _grid(run, family, statistic)
            for site, peak, row, seen in zip(
                values.index, _peak((values, known)), values.to_numpy(), known.to_numpy(), strict=True
            ):
                bad = seen & ~np.isfinite(row)
                step = values.columns[int(bad.argmax() if bad.any() else np.nanargmax(row))]
                rows.append((name, f"{family}/{site}/{statistic}", peak, step))
    # A value that is not finite has gone beyond the limit: it comes first.
    rows.sort(key=lambda row: -row[2] if np.isfinite(row[2]) else -np.inf)
    if not rows:
        return _section("Ranges", [], "")
    shown = [[name, metric, _short(peak), str(step), _bits(peak)] for name, metric, peak, step in rows[:most]]
    table = Table(
        columns=["run", "metric", "largest |value|", "at step", "bits left in fp16"],
        rows=shown,
        note="Bits left: log2(65,504 / largest value). A loss scale takes its own bits from gradients.",
    )
    return _section(
        "Ranges", [table], "The places that come nearest to the largest number that fp16 can hold."
    )


def updates(runs: Runs) -> Section:
    """How far an optimizer step moves each parameter, beside the parameter's own size."""
    grids = {label: [_update_ratio(run) for run in several] for label, several in runs.items()}
    lines = {
        label: [grid[0].median(axis=0)[grid[1].any(axis=0)] for grid in several if grid[0].size]
        for label, several in grids.items()
    }
    if not any(lines.values()):
        return _section("Updates", [], "")
    chart = curves(lines, title="Update size over weight size (RMS), median over parameters", log=True)
    parts: list[TableOrChart] = [chart]
    largest = {
        label: _per_layer(several[0], runs[label][0].places, join="max")
        for label, several in grids.items()
        if several and several[0][0].size
    }
    parts += _maps(largest, "Largest update-to-weight ratio, layer by step")
    return _section(
        "Updates",
        parts,
        "A ratio near 0.001 is usual; a block that moves far faster than its neighbours is not.",
    )


def outliers(runs: Runs) -> Section:
    """The share of activation values that are outliers."""
    lines = {}
    for label, several in runs.items():
        matrices = [run.matrix("activation", "outlier_fraction") for run in several]
        lines[label] = [matrix.mean(axis=0) for matrix in matrices if matrix.size]
    if not any(lines.values()):
        return _section("Activation outliers", [], "")
    chart = curves(lines, title="Share of activation values with |x| ≥ 6, mean over sites", unit="share")
    text = "The criterion is LLM.int8()'s magnitude threshold alone; other criteria give other shares."
    return _section("Activation outliers", [chart], text)


def block_grid(run: Run) -> RecordedGrid:
    """The largest magnitude of every block's output: rows the blocks by depth, columns the steps."""
    values, known = _grid(run, "activation", "absmax")
    places = run.places
    numbers = {
        site: (places.stack_of(str(site)), number)
        for site in values.index
        if (number := places.block_number(str(site))) is not None
    }
    order = sorted(numbers, key=lambda site: numbers[site])
    return values.loc[order], known.loc[order]


def embedding_site(run: Run) -> str | None:
    """The parameter that is the token embedding; None where the run does not say, and no name does."""
    metrics = run.metrics
    sites = metrics.loc[(metrics["family"] == "gradient") & (metrics["statistic"] == "share"), "site"]
    return next((site for site in sites if run.places.is_embedding(site)), None)


def _section(title: str, parts: Sequence[TableOrChart], text: str) -> Section:
    if not parts:
        return Section(title=title, text=("This was not recorded.",))
    return Section(title=title, text=(text,) if text else (), parts=parts)


def _embedding_share(run: Run) -> pd.Series[float]:
    site = embedding_site(run)
    return run.series(f"gradient/{site}/share") if site else pd.Series(dtype=float)


def _grid(run: Run, family: str, statistic: str) -> RecordedGrid:
    return run.matrix(family, statistic, index="max"), run.recorded(family, statistic)


def _update_ratio(run: Run) -> RecordedGrid:
    """Update over weight. Over weights that are all zero (biases, at first) it is infinite and says nothing, so it is left out."""
    values, known = _grid(run, "update", "ratio")
    from_zero = run.matrix("update", "weight_rms").reindex_like(values) == 0
    return values.mask(from_zero), known & ~from_zero


def _peak(grid: RecordedGrid) -> pd.Series[float]:
    """Each site's largest value over the steps; NaN where one that was recorded is NaN."""
    values, known = grid
    return values.max(axis=1).mask((values.isna() & known).any(axis=1))


def _over_sites(grid: RecordedGrid) -> pd.Series[float]:
    """The largest value over sites at each step; NaN where one that was recorded is NaN."""
    return _peak((grid[0].T, grid[1].T))


def _heads(run: Run) -> Iterable[pd.Series[float]]:
    """For every head number, its largest score in each layer."""
    rows = run.rows("attention", "score_max")
    order = rows["site"].astype(str).unique()
    layer = rows["site"].astype(str).rename("layer")
    broken = rows["value"].isna().groupby([rows["index"], layer]).any()
    largest = rows["value"].groupby([rows["index"], layer]).max().mask(broken)
    return [largest.loc[head].reindex(order) for head in largest.index.get_level_values(0).unique()]


def _per_layer(grid: RecordedGrid, places: Places, join: str = "norm") -> RecordedGrid:
    """One row a block: norms joined as the root of their squares' sum, or the largest of them."""
    values, known = grid
    groups = np.array([places.block_of(str(site)) for site in values.index], dtype=object)
    order = list(dict.fromkeys(groups))
    if join == "norm":
        joined = (values**2).groupby(groups).sum(min_count=1).pow(0.5)
    else:
        joined = values.groupby(groups).max()
    broken = (values.isna() & known).groupby(groups).any()
    return joined.mask(broken).reindex(order), known.groupby(groups).any().reindex(order)


def _maps(grids: Mapping[str, RecordedGrid], title: str, *, log: bool = True) -> list[TableOrChart]:
    """One map a label, on one colour scale."""
    values = [grid[0].to_numpy(dtype=float).ravel() for grid in grids.values()]
    every = np.concatenate([np.empty(0), *values])
    every = every[np.isfinite(every) & ((every > 0) | (not log))]
    limits = (float(every.min()), float(every.max())) if every.size else None
    pictures: list[TableOrChart] = []
    for label, (matrix, known) in grids.items():
        if matrix.size:
            name = title if len(grids) == 1 else f"{title}: {label}"
            pictures.append(heat_map(matrix, title=name, log=log, limits=limits, recorded=known))
            # With one run, a reader can follow a layer by itself.
            if len(grids) == 1 and len(matrix) > 1:
                pictures.append(layer_curves(matrix, title=title.partition(",")[0] + ", one layer"))
    return pictures


def _headroom(what: str, found: Mapping[str, Sequence[pd.Series[float]]]) -> str:
    """ "The largest score was 17.3, 11.9 bits below ..." for one run; nothing for several."""
    series = [s for several in found.values() for s in several if len(s)]
    if len(series) != 1:
        return ""
    largest = float(series[0].max(skipna=False))
    if not np.isfinite(largest):
        return f"A {what} that is not finite was seen."
    below = f", {_bits(largest)} bits below the largest fp16 number" if 0 < largest <= FP16_MAX else ""
    return f"The largest {what} was {_short(largest)}{below}."


def _bits(value: float) -> str:
    if not np.isfinite(value):
        return "none"
    return f"{np.log2(FP16_MAX / value):.1f}" if value > 0 else "all"


def _short(value: float) -> str:
    return plain(float(f"{value:.4g}"))

"""Charts of values over steps and over depth. Seeds are thin and their mean thick; what is not finite is a cross at the upper edge.

A curve has as many points as a screen can tell apart: for each stretch of steps its lowest, its highest and one that is not finite
(``figures.numbers.thinned``), so a spike of one step in 100,000 is drawn at its height.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from stabilitylab.charts.look import (
    Chart,
    ceiling,
    colours,
    constant_in_view,
    hover,
    legend_of,
    not_recorded,
    number_axis,
    panel,
    step_axis,
    words,
)
from stabilitylab.figures.lines import Lines, Mark, logarithmic, mean_of_seeds, together
from stabilitylab.figures.numbers import positive, thinned
from stabilitylab.figures.palette import ALARM

# Points of all curves of a chart together, and the fewest of one.
POINTS, FEWEST = 24_000, 60
MOST_POINTS = 2_000
POINTS_OF_A_LAYER = 400
FEW = 4
# More shaded stretches than these hide the curves: then only onsets are marked.
MOST_SHADED = 12


def curves(
    lines: Lines,
    *,
    title: str,
    unit: str = "",
    log: bool | Literal["auto"] = False,
    base: int = 10,
    stairs: bool = False,
    limit: tuple[float, str] | None = None,
    marks: Mapping[str, Sequence[Mark]] | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    caption: str = "",
    mean: bool = True,
) -> Chart:
    """Values over steps; several series under one label are seeds: thin, with their mean thick.

    Args:
        lines: label -> series with the step as index.
        log, base, stairs, limit, marks: as of ``stabilitylab.figures.curves.curves``.
        names: label -> the name of each of its series, shown where the pointer is on it.
        caption: below it.
        mean: draw the mean of a label's series.
    """
    count = sum(len(several) for several in lines.values())
    points = int(np.clip(POINTS // max(count, 1), FEWEST, MOST_POINTS))
    drawn = {label: [thinned(s, points) for s in several] for label, several in lines.items()}
    every = together(s.to_numpy(dtype=float) for several in drawn.values() for s in several)
    scaled = logarithmic(log, every)
    made = panel(title, y=unit, y_axis_type="log" if scaled else "linear")
    if not every.size:
        not_recorded(made)
        return Chart(figure=made, caption=caption)
    edge = ceiling(every, log=scaled)
    constant_in_view(made, every, log=scaled)
    # Where curves are few, the pointer's step tells all of them; where many, only the one under it.
    mode = "vline" if count <= FEW else "mouse"
    entries: dict[str, list[Any]] = {}
    for (label, several), colour in zip(drawn.items(), colours(), strict=False):
        shown = entries.setdefault(label, [])
        called = list((names or {}).get(label, ())) or [
            label if len(several) == 1 else f"{label}, {i + 1}" for i in range(len(several))
        ]
        shown += _seeds(made, several, called, colour, edge, stairs=stairs, thin=len(several) > 1, mode=mode)
        if len(several) > 1 and mean:
            middle = thinned(mean_of_seeds(lines[label]), MOST_POINTS)
            shown += _line(made, middle, f"{label}, mean", colour, stairs=stairs, mode=mode)
        shown += _marks(
            made,
            lines[label],  # not what is drawn: an onset may be no extreme
            (marks or {}).get(label, ()),
            colour if len(drawn) > 1 else ALARM,
            edge,
            shaded=sum(map(len, (marks or {}).values())) <= MOST_SHADED,
        )
    if (
        limit is not None
        and every[np.isfinite(every)].size
        and every[np.isfinite(every)].max() * 30 > limit[0]
    ):
        _limit(made, limit)
    number_axis(made.yaxis[0], base=base if scaled else 10)
    step_axis(made.xaxis[0])
    return Chart(figure=made, caption=caption, legend=legend_of(entries) if len(drawn) > 1 else {})


def by_depth(
    values: Mapping[str, Sequence[pd.Series[float]]],
    *,
    title: str,
    unit: str = "",
    limit: tuple[float, str] | None = None,
    joined: bool = True,
    caption: str = "",
) -> Chart:
    """Values by layer, counted from 0 in the order given. Several series under a label are seeds, or heads.

    Args:
        values: label -> series, one value a layer, named by its site.
        joined: draw the mean of a label's series as a line; False: only a dot for each value (heads).
    """
    every = together(s.to_numpy(dtype=float) for several in values.values() for s in several)
    scaled = positive(every)
    made = panel(title, x="layer", y=unit, y_axis_type="log" if scaled else "linear")
    if not every.size:
        not_recorded(made)
        return Chart(figure=made, caption=caption)
    edge = ceiling(every, log=scaled)
    constant_in_view(made, every, log=scaled)
    entries: dict[str, list[Any]] = {}
    for (label, several), colour in zip(values.items(), colours(), strict=False):
        shown = entries.setdefault(label, [])
        for number, series in enumerate(s for s in several if len(s)):
            value = series.to_numpy(dtype=float)
            finite = np.isfinite(value)
            source = {
                "x": np.arange(len(value), dtype=np.int32),
                "y": np.where(finite, value, edge),
                "said": [f"{v:.5g}" for v in value],
                "site": [words(site) for site in series.index],
                "name": [label if len(several) == 1 else f"{label} {number}"] * len(value),
            }
            dots = made.scatter(
                "x", "y", source=_source(source), color=colour, size=6, alpha=0.8 if joined else 0.5,
                marker="circle",
            )  # fmt: skip
            broken = made.scatter(
                "x", "y", source=_source({k: np.asarray(v)[~finite] for k, v in source.items()}),
                marker="x", color=colour, size=8,
            )  # fmt: skip
            hover(made, [dots], [("", "@name"), ("layer @x", "@site"), ("value", "@said")])
            shown += [dots, broken]
        if joined and any(len(s) for s in several):
            middle = mean_of_seeds([s.reset_index(drop=True) for s in several if len(s)])
            shown.append(made.line(middle.index, middle.to_numpy(), color=colour, line_width=2))
    if limit is not None and scaled:
        _limit(made, limit)
    number_axis(made.yaxis[0])
    step_axis(made.xaxis[0])
    return Chart(figure=made, caption=caption, legend=legend_of(entries) if len(values) > 1 else {})


def layer_curves(matrix: pd.DataFrame, *, title: str) -> Chart:
    """One layer's values over the steps, and a choice of which layer: rows the layers, columns the steps."""
    layers = [str(site) for site in matrix.index]
    steps, values = _stretches(matrix, POINTS_OF_A_LAYER)
    every = values[np.isfinite(values)]
    made = panel(title, y_axis_type="log" if positive(every) else "linear")
    if not every.size:
        not_recorded(made)
        return Chart(figure=made)
    columns = {f"c{i}": single(row) for i, row in enumerate(values)}
    first = int(np.argmax(np.max(np.where(np.isfinite(values), values, -np.inf), axis=1)))
    source = _source({"x": steps.astype(np.int32), "y": columns[f"c{first}"], **columns})
    source.name = "choice"
    line = made.line("x", "y", source=source, color=next(colours()), line_width=1.6)
    hover(made, [line], [("step", "@x{0,0}"), ("value", "@y{0.[0000]a}")], mode="vline")
    number_axis(made.yaxis[0])
    step_axis(made.xaxis[0])
    choices = {words(layer): f"c{i}" for i, layer in enumerate(layers)}
    return Chart(figure=made, choices=choices, chosen=words(layers[first]))


def _stretches(matrix: pd.DataFrame, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all rows share, and their values there: of each stretch a row's lowest and highest, the earlier one first."""
    steps, values = matrix.columns.to_numpy(), matrix.to_numpy(dtype=float)
    if len(steps) <= points:
        return steps, values
    starts = np.arange(points // 2) * len(steps) // (points // 2)
    ends = np.append(starts[1:], len(steps))
    shown = np.full((len(values), 2 * len(starts)), np.nan)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        part = values[:, start:end]
        known = np.isfinite(part)
        low = np.argmin(np.where(known, part, np.inf), axis=1)
        high = np.argmax(np.where(known, part, -np.inf), axis=1)
        rows = np.arange(len(values))
        shown[:, 2 * number] = part[rows, np.minimum(low, high)]
        shown[:, 2 * number + 1] = part[rows, np.maximum(low, high)]
    middle = (starts + ends) // 2
    return np.stack([steps[starts], steps[middle]], axis=1).ravel(), shown


def single(values: np.ndarray) -> np.ndarray:
    """Values as float32, half as heavy; what lies beyond its range goes to its ends."""
    most = float(np.finfo(np.float32).max)
    return np.where(np.isfinite(values), np.clip(values, -most, most), np.nan).astype(np.float32)


def _source(columns: Mapping[str, Any]) -> Any:
    from bokeh.models import ColumnDataSource

    return ColumnDataSource(dict(columns))


def _seeds(
    made: Any,
    several: Sequence[pd.Series[float]],
    called: Sequence[str],
    colour: str,
    edge: float,
    *,
    stairs: bool,
    thin: bool,
    mode: str,
) -> list[Any]:
    shown: list[Any] = []
    crosses: dict[str, list[Any]] = {"x": [], "y": [], "name": []}
    for series, name in zip(several, called, strict=True):
        value = series.to_numpy(dtype=float)
        finite = np.isfinite(value)
        if len(series):
            shown += _line(made, series[finite], name, colour, stairs=stairs, thin=thin, mode=mode)
        bad = series.index[~finite]
        crosses["x"] += list(bad)
        crosses["y"] += [edge] * len(bad)
        crosses["name"] += [words(name)] * len(bad)
    if crosses["x"]:
        broken = made.scatter("x", "y", source=_source(crosses), marker="x", color=colour, size=8)
        hover(made, [broken], [("", "@name"), ("step @x{0,0}", "not finite")])
        shown.append(broken)
    return shown


def _line(
    made: Any,
    series: pd.Series[float],
    name: str,
    colour: str,
    *,
    stairs: bool,
    thin: bool = False,
    mode: str = "mouse",
) -> list[Any]:
    if not len(series):
        return []
    source = _source(
        {
            "x": series.index.to_numpy(dtype=np.int32 if series.index.max() < 2**31 else float),
            "y": single(series.to_numpy(dtype=float)),
        }
    )
    look: dict[str, Any] = {
        "color": colour,
        "line_width": 1.0 if thin else 2.0,
        "line_alpha": 0.45 if thin else 1,
    }
    if len(series) == 1:
        glyph = made.scatter("x", "y", source=source, color=colour, size=6)
    elif stairs:
        glyph = made.step("x", "y", source=source, mode="after", **look)
    else:
        glyph = made.line("x", "y", source=source, **look)
    said = words(name).replace("@", "(at)").replace("$", "\uff04")
    hover(made, [glyph], [("", said), ("step", "@x{0,0}"), ("value", "@y{0,0.[00000]}")], mode=mode)
    return [glyph]


def _limit(made: Any, limit: tuple[float, str]) -> None:
    from bokeh.models import Label, Span

    made.add_layout(Span(location=limit[0], dimension="width", line_color=ALARM, line_dash="dashed"))
    made.add_layout(
        Label(
            x=8, x_units="screen", y=limit[0], text=words(limit[1]), text_color=ALARM, text_font_size="11px"
        )
    )


def _marks(
    made: Any,
    several: Sequence[pd.Series[float]],
    marks: Sequence[Mark],
    colour: str,
    edge: float,
    *,
    shaded: bool,
) -> list[Any]:
    """Shade every episode if ``shaded``, and put a triangle above its onset, which tells its kind where the pointer is."""
    from bokeh.models import BoxAnnotation

    if not marks:
        return []
    rows: dict[str, list[Any]] = {"x": [], "y": [], "kind": [], "span": []}
    for mark in sorted(marks):
        if shaded:
            shade = {"left": mark.onset, "fill_color": colour, "fill_alpha": 0.13, "level": "underlay"}
            right = {} if mark.end is None else {"right": max(mark.end, mark.onset + 0.5)}
            made.add_layout(
                BoxAnnotation(**shade, **right, line_color=colour, line_alpha=0.25, propagate_hover=True)
            )
        # Of several seeds, the episode happened in the one that stands out there.
        heights = [s.loc[mark.onset] for s in several if mark.onset in s.index]
        rows["x"].append(mark.onset)
        rows["y"].append(max([float(h) if np.isfinite(h) else edge for h in heights], default=edge))
        rows["kind"].append(words(mark.text))
        rows["span"].append(
            f"step {mark.onset:,}" + (" to the end" if mark.end is None else f" to {mark.end:,}")
        )
    dots = made.scatter("x", "y", source=_source(rows), marker="inverted_triangle", size=11, color=colour)
    hover(made, [dots], [("", "@kind"), ("", "@span")])
    return [dots]

"""Maps as charts: sites down, steps across, the value as colour, and as a number where the pointer is.

Cells are joined as in ``stabilitylab.figures.maps``: at most 400 columns at their own steps, a stretch's largest value wins, and
one that is not finite before it. Layer 0 lies at the bottom. Red is not finite; an empty cell was not recorded.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from stabilitylab.charts.curves import single
from stabilitylab.charts.look import (
    HEIGHT,
    INK,
    Chart,
    hover,
    not_recorded,
    number_axis,
    panel,
    step_axis,
    words,
)
from stabilitylab.figures.map_cells import BROKEN, cells

WIDEST_NAME = 26


def heat_map(
    matrix: pd.DataFrame,
    *,
    title: str,
    log: bool = True,
    limits: tuple[float, float] | None = None,
    recorded: pd.DataFrame | None = None,
    across: str = "step",
    caption: str = "",
) -> Chart:
    """A statistic at every site over the steps; arguments as of ``stabilitylab.figures.maps.heat_map``."""
    from bokeh.models import (
        ColorBar,
        ColumnDataSource,
        CustomJSHover,
        FixedTicker,
        LinearColorMapper,
        LogColorMapper,
    )

    grid = cells(matrix, recorded=recorded, across=across)
    count = len(grid.sites)
    made = panel(title, x=across, height=int(np.clip(110 + 16 * count, 190, 2 * HEIGHT)))
    if not grid.known.any():
        not_recorded(made)
        return Chart(figure=made, caption=caption)
    finite = grid.values[np.isfinite(grid.values) & ((grid.values > 0) | (not log))]
    low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.1, 1.0))
    high = high if high > low else low + max(abs(low) * 0.01, 1e-12)
    left, right = grid.stretch
    shown = np.where(np.isfinite(grid.values), np.clip(grid.values, low, high), np.nan)
    shown[~grid.known] = np.nan
    mapper = (LogColorMapper if log else LinearColorMapper)(
        palette="Viridis256", low=low, high=high, nan_color="rgba(0,0,0,0)"
    )
    place = {"x": [left], "y": [-0.5], "dw": [right - left], "dh": [count]}
    image = made.image(
        "image",
        x="x",
        y="y",
        dw="dw",
        dh="dh",
        source=ColumnDataSource({"image": [single(shown)], **place}),
        color_mapper=mapper,
    )
    named = CustomJSHover(
        args={"names": [words(site) for site in grid.sites]},
        code="return names[Math.max(0, Math.min(names.length - 1, Math.round(special_vars.y)))]",
    )
    told = [("", "$y{custom}"), (across, "$x{0,0}"), ("value", "@image{0,0.[00000]}")]
    hover(made, [image], told, formatters={"$y": named})
    broken = grid.known & ~np.isfinite(grid.values)
    rows, columns = np.nonzero(broken)
    if len(rows):
        width = (right - left) / broken.shape[1]
        source = ColumnDataSource(
            {
                "x": left + (columns + 0.5) * width,
                "y": rows,
                "site": [words(grid.sites[row]) for row in rows],
            }
        )
        red = made.rect("x", "y", width=width, height=1, source=source, color=BROKEN)
        hover(made, [red], [("", "@site"), (f"{across} @x{{0,0}}", "not finite")])
    bar = ColorBar(color_mapper=mapper, width=10, background_fill_color=None, major_label_text_color=INK)
    number_axis(bar)
    made.add_layout(bar, "right")
    every = max(1, -(-count // 24))
    at = list(range(0, count, every))
    made.yaxis[0].ticker = FixedTicker(ticks=at)
    made.yaxis[0].major_label_overrides = {i: words(_short(grid.sites[i])) for i in at}
    made.grid.grid_line_color = None
    made.x_range.range_padding = made.y_range.range_padding = 0
    if across == "step":
        step_axis(made.xaxis[0])
    said = "Red is not finite." if len(rows) else ""
    return Chart(figure=made, caption=f"{caption} {said}".strip())


def _short(name: str) -> str:
    """Long names keep their end, where they differ."""
    return name if len(name) <= WIDEST_NAME else "…" + name[1 - WIDEST_NAME :]

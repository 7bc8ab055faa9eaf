"""Maps: sites down, steps across, the value as colour.

Layer 0 lies at the bottom. A cell that is not finite is red with a cross, one that was not recorded stays empty. map_cells.py says
which cells there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stabilitylab.figures.map_cells import BROKEN, cells, named_sites
from stabilitylab.figures.palette import ALARM
from stabilitylab.figures.style import STYLE, WIDTH, log_axis, panel, say_not_recorded


def heat_map(
    matrix: pd.DataFrame,
    *,
    title: str,
    log: bool = True,
    limits: tuple[float, float] | None = None,
    recorded: pd.DataFrame | None = None,
    across: str = "step",
) -> Figure:
    """A statistic at every site over the steps.

    Args:
        matrix: rows the sites, from the model's input to its output; columns the steps.
        log: logarithmic colours; values of 0 and below take the lowest colour.
        limits: of the colour scale; by default the data's own.
        recorded: where a value was recorded, of the matrix's shape (``Run.recorded``): elsewhere is a gap. By default
            everywhere.
        across: what the columns are.
    """
    values, known, steps, sites, stretch, even = cells(matrix, recorded=recorded, across=across)
    finite = values[np.isfinite(values) & ((values > 0) | (not log))]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = panel(min(6.0, max(1.7, 1.0 + 0.15 * len(sites))))
        axes.set_title(title)
        if not known.any():
            say_not_recorded(axes)
            return figure
        low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.1, 1.0))
        high = high if high > low else low + max(abs(low) * 0.01, 1e-12)
        scale = LogNorm(low, high, clip=True) if log else Normalize(low, high, clip=True)
        broken = known & ~np.isfinite(values)
        shown = np.ma.masked_where(~np.isfinite(values), np.clip(np.nan_to_num(values), low, high))
        image = axes.imshow(
            shown,
            aspect="auto",
            cmap=mpl.colormaps["viridis"].with_extremes(bad=(0, 0, 0, 0)),
            norm=scale,
            interpolation="nearest",
            origin="lower",
            extent=(*stretch, -0.5, len(sites) - 0.5),
        )
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=max(8, 3 * len(sites) ** 0.5))
        if log:
            log_axis(bar.ax.yaxis)
        _break(axes, broken, image.get_extent())
        _label_sites(axes, sites)
        if even:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        else:
            ticks = np.unique(np.linspace(0, len(steps) - 1, min(8, len(steps))).round().astype(int))
            axes.set_xticks(ticks, [str(steps[i]) for i in ticks])
        axes.set_xlabel(f"{across}; red: not finite" if broken.any() else across)
        return figure


def table_figure(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str, style: Mapping[str, Any] = STYLE
) -> Figure:
    """A small table as a picture, for places that show pictures only."""
    with mpl.rc_context({**style}):
        figure, axes = panel(0.9 + 0.24 * (len(rows) + 1))
        axes.set_title(title)
        axes.set_axis_off()
        if not rows:
            axes.text(0.0, 0.9, "none", va="top", transform=axes.transAxes)
            return figure
        table = axes.table(
            cellText=rows, colLabels=columns, loc="upper left", cellLoc="left", edges="horizontal"
        )
        for cell in table.get_celld().values():
            cell.PAD = 0.06
        table.auto_set_font_size(False)
        table.set_fontsize(9)
        table.auto_set_column_width(list(range(len(columns))))
        for (row, _), cell in table.get_celld().items():
            cell.set_edgecolor("#7f7f7e40")
            cell.get_text().set_color(
                style["text.color"] if row == 0 else ALARM if rows[row - 1][-1] == "open" else "#555555"
            )
        return figure


def _break(axes: Axes, broken: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    if not broken.any():
        return
    red = np.ma.masked_where(~broken, np.ones(broken.shape))
    axes.imshow(
        red,
        aspect="auto",
        cmap=mpl.colors.ListedColormap([BROKEN]).with_extremes(bad=(0, 0, 0, 0)),
        interpolation="nearest",
        origin="lower",
        extent=extent,
    )
    rows, columns = np.nonzero(broken)
    if len(rows) <= 200:
        left, right = extent[:2]
        places = left + (columns + 0.5) * (right - left) / broken.shape[1]
        axes.plot(places, rows, "x", color="white", markersize=3, markeredgewidth=0.8)


def _label_sites(axes: Axes, sites: Sequence[str]) -> None:
    """Names where they fit; long ones keep their end, where they differ."""
    places = named_sites(sites, 32)
    names = [sites[i] for i in places]
    longest = int(WIDTH * 5)
    axes.set_yticks(places, [name if len(name) <= longest else "…" + name[1 - longest :] for name in names])
    axes.tick_params(axis="y", labelsize=7.5)

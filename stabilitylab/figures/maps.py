"""Maps: sites down, steps across, the value as colour.

Layer 0 lies at the bottom. A cell that is not finite is red with a cross, one that was not recorded stays empty. Where there
are more steps than can be told apart, neighbours are joined by their largest value, and one that is not finite wins. Steps lie
across at their own places, however unevenly they were measured; a measurement holds until the next one, or for twice the usual
distance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from stabilitylab.figures.style import ALARM, STYLE, WIDTH, log_axis, panel, say_not_recorded

COLUMNS = 400
ROWS = 200
BROKEN = "#d62728"
_APART = (2, 5, 10, 20, 50, 100, 200, 500, 1000)


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


class Cells(NamedTuple):
    """What a map shows.

    Attributes:
        values, known: sites x columns, and whether anything was recorded there.
        steps, sites: names of columns and rows.
        stretch: from where to where the columns reach: in steps where ``even``, else counted.
        even: whether the columns lie at their own steps.
    """

    values: NDArray[np.float64]
    known: NDArray[np.bool_]
    steps: list[object]
    sites: list[str]
    stretch: tuple[float, float]
    even: bool


def cells(matrix: pd.DataFrame, *, recorded: pd.DataFrame | None = None, across: str = "step") -> Cells:
    """The cells of a map; arguments as of ``heat_map``."""
    everywhere = np.ones(matrix.shape, dtype=bool)
    known = everywhere if recorded is None else recorded.reindex_like(matrix).to_numpy(dtype=bool)
    stretch: tuple[float, float] | None = None
    if across == "step" and _are_steps(matrix.columns):
        matrix, known, stretch = _at_their_steps(matrix, known)
    values, known, steps, sites = _joined(matrix, known)
    return Cells(values, known, steps, sites, stretch or (-0.5, len(steps) - 0.5), stretch is not None)


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


def _are_steps(columns: pd.Index[Any]) -> bool:
    return (
        len(columns) > 1 and pd.api.types.is_integer_dtype(columns) and bool(columns.is_monotonic_increasing)
    )


def _at_their_steps(
    matrix: pd.DataFrame, known: NDArray[np.bool_]
) -> tuple[pd.DataFrame, NDArray[np.bool_], tuple[float, float]]:
    """The matrix on evenly spaced columns, at most COLUMNS, where those of it are known, and from where to where they reach."""
    steps = matrix.columns.to_numpy(dtype=np.int64)
    apart = np.diff(steps)
    first, span = int(steps[0]), int(steps[-1] - steps[0]) + 1
    width = max(int(apart.min()), -(-span // COLUMNS), 1)
    stretch = (steps - first) // width
    starts = np.flatnonzero(np.r_[True, np.diff(stretch) > 0])
    values = matrix.to_numpy(dtype=float)
    broken = np.maximum.reduceat(known & ~np.isfinite(values), starts, axis=1)
    largest = np.maximum.reduceat(np.where(np.isfinite(values), values, -np.inf), starts, axis=1)
    seen = np.maximum.reduceat(known, starts, axis=1)
    measured = stretch[starts]
    count = int(measured[-1]) + 1
    holds = -(-2 * int(np.quantile(apart, 0.9)) // width)
    latest = np.searchsorted(measured, np.arange(count), side="right") - 1
    fresh = np.arange(count) - measured[latest] < max(holds, 1)
    even = np.where(fresh, np.where(broken | ~seen, np.nan, largest)[:, latest], np.nan)
    places = first + width * np.arange(count)
    return (
        pd.DataFrame(even, index=matrix.index, columns=places),
        seen[:, latest] & fresh,
        (first - 0.5, float(first + width * count) - 0.5),
    )


def _joined(
    matrix: pd.DataFrame, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[object], list[str]]:
    """Values, where any was recorded, steps and sites, with at most COLUMNS columns and ROWS rows."""
    values = matrix.to_numpy(dtype=float)
    for axis, most in ((1, COLUMNS), (0, ROWS)):
        length = values.shape[axis]
        if length > most:
            starts = np.unique(np.arange(most) * length // most)
            broken = np.maximum.reduceat(known & ~np.isfinite(values), starts, axis=axis)
            largest = np.maximum.reduceat(np.where(np.isfinite(values), values, -np.inf), starts, axis=axis)
            known = np.maximum.reduceat(known, starts, axis=axis)
            values = np.where(broken | ~known, np.nan, largest)
    return (
        values,
        known,
        [matrix.columns[i] for i in _starts(matrix.shape[1], COLUMNS)],
        [str(matrix.index[i]) for i in _starts(matrix.shape[0], ROWS)],
    )


def _starts(length: int, most: int) -> np.ndarray:
    return np.arange(length) if length <= most else np.unique(np.arange(most) * length // most)


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


def named_sites(sites: Sequence[str], most: int) -> list[int]:
    """Which rows are named: all where they fit, else those of round numbers (layers.0, layers.10, ...), the first and the last."""
    count = len(sites)
    if count <= most:
        return list(range(count))
    numbers = [int(found[-1]) if (found := re.findall(r"\d+", site)) else None for site in sites]
    for apart in _APART:
        places = [i for i, number in enumerate(numbers) if number is not None and number % apart == 0]
        places = places if len(places) > 2 else list(range(0, count, apart))
        if len(places) <= most:
            break
    room = max(1, count // (2 * most))  # what stands closer would lie on one another
    return [0, *(i for i in places if room < i < count - 1 - room), count - 1]


def _label_sites(axes: Axes, sites: Sequence[str]) -> None:
    """Names where they fit; long ones keep their end, where they differ."""
    places = named_sites(sites, 32)
    names = [sites[i] for i in places]
    longest = int(WIDTH * 5)
    axes.set_yticks(places, [name if len(name) <= longest else "…" + name[1 - longest :] for name in names])
    axes.tick_params(axis="y", labelsize=7.5)

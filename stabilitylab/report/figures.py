"""Figures: one quiet look for all, readable on light and on dark paper, non-finite values shown.

Lines are coloured in the Okabe-Ito order (safe for colour-blind readers), seeds thin and their mean thick. Axes and text are
mid-grey on a transparent ground, so that one picture serves both modes. A value that is not finite cannot be drawn at its
place: it becomes a cross at the upper edge, or a hatched cell in a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
GREY = "#7f7f7f"
SPIKE = "#D55E00"
FP16_MAX = 65504.0

STYLE: dict[str, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.2,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "font.family": "sans-serif",
    "svg.fonttype": "path",
    "svg.hashsalt": "stabilitylab",
}


def curves(
    lines: Mapping[str, Sequence[pd.Series[float]]],
    *,
    title: str,
    unit: str = "",
    log: bool = False,
    limit: tuple[float, str] | None = None,
    marks: Mapping[str, Sequence[tuple[int, str]]] | None = None,
) -> Figure:
    """Values over steps; several series under one label are seeds: thin, with their mean thick.

    Args:
        lines: label -> series with the step as index.
        log: logarithmic value axis.
        limit: a horizontal line and its name, drawn only where it is within a factor of 30 of the data.
        marks: label -> (step, text) of events, drawn on the label's first series.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        axes = figure.subplots()
        for (label, series), colour in zip(lines.items(), _colours(), strict=False):
            seeds = [s for s in series if len(s)]
            for s in seeds:
                finite = s[np.isfinite(s)]
                thin: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.45} if len(seeds) > 1 else {}
                axes.plot(finite.index, finite, color=colour, label=None if len(seeds) > 1 else label, **thin)
                bad = s.index[~np.isfinite(s)]
                if len(bad):
                    edge = axes.get_xaxis_transform()
                    axes.plot(bad, np.full(len(bad), 0.98), "x", color=colour, markersize=5, transform=edge)
            if len(seeds) > 1:
                mean = pd.concat(seeds, axis=1).replace([np.inf, -np.inf], np.nan).mean(axis=1)
                axes.plot(mean.index, mean, color=colour, label=label)
            _mark(axes, seeds, (marks or {}).get(label, ()))
        if log:
            axes.set_yscale("log")
        if limit is not None and _near(lines, limit[0]):
            axes.axhline(limit[0], color=SPIKE, linewidth=1, linestyle="--")
            axes.annotate(
                limit[1],
                (0.01, limit[0]),
                xycoords=("axes fraction", "data"),
                va="bottom",
                fontsize=8,
                color=SPIKE,
            )
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if any(any(len(s) for s in series) for series in lines.values()):
            axes.legend(ncols=min(4, len(lines)), loc="best")
        else:
            axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
        return figure


def heat_map(
    matrix: pd.DataFrame, *, title: str, log: bool = True, limits: tuple[float, float] | None = None
) -> Figure:
    """Sites down, steps across, the value as colour. Cells that are not finite are red.

    Args:
        matrix: rows the sites, columns the steps.
        limits: of the colour scale; by default the data's own.
    """
    values = matrix.to_numpy(dtype=float)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        height = min(7.0, max(1.6, 0.8 + 0.17 * len(matrix)))
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.subplots()
        finite = values[np.isfinite(values) & ((values > 0) | (not log))]
        if not finite.size:
            axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
            axes.set_title(title)
            return figure
        low, high = limits or (float(finite.min()), float(finite.max()))
        high = high if high > low else low * 1.01 + 1e-12
        scale = LogNorm(low, high, clip=True) if log else Normalize(low, high, clip=True)
        colours = mpl.colormaps["viridis"].with_extremes(bad="#d62728")
        shown = np.ma.masked_invalid(
            np.where(np.isfinite(values), np.clip(values, low, None) if log else values, np.nan)
        )
        image = axes.imshow(
            shown, aspect="auto", cmap=colours, norm=scale, interpolation="nearest", origin="lower"
        )
        figure.colorbar(image, ax=axes, pad=0.01)
        _label_sites(axes, [str(site) for site in matrix.index])
        ticks = np.unique(
            np.linspace(0, len(matrix.columns) - 1, min(8, len(matrix.columns))).round().astype(int)
        )
        axes.set_xticks(ticks, [str(matrix.columns[i]) for i in ticks])
        axes.set_xlabel("step")
        axes.set_title(title)
        return figure


def by_layer(
    values: Mapping[str, Sequence[pd.Series[float]]], *, title: str, limit: tuple[float, str] | None = None
) -> Figure:
    """One value a layer: how a quantity grows with depth. Several series under a label are seeds."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        axes = figure.subplots()
        for (label, series), colour in zip(values.items(), _colours(), strict=False):
            seeds = [s.reset_index(drop=True) for s in series if len(s)]
            if not seeds:
                continue
            for s in seeds if len(seeds) > 1 else ():
                axes.plot(s.index, s, color=colour, linewidth=0.7, alpha=0.45)
            mean = pd.concat(seeds, axis=1).mean(axis=1)
            axes.plot(mean.index, mean, "o-", color=colour, label=label, markersize=3)
        axes.set_yscale("log")
        if limit is not None:
            axes.axhline(limit[0], color=SPIKE, linewidth=1, linestyle="--")
            axes.annotate(
                limit[1],
                (0.01, limit[0]),
                xycoords=("axes fraction", "data"),
                va="bottom",
                fontsize=8,
                color=SPIKE,
            )
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(ncols=2)
        else:
            axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
        return figure


def dots(values: Mapping[str, Mapping[str, Sequence[float]]], *, title: str, log: bool = False) -> Figure:
    """Groups of arms, one dot a seed and a bar at the mean: ``values[group][arm]``."""
    arms = list(dict.fromkeys(arm for group in values.values() for arm in group))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.6), layout="constrained")
        axes = figure.subplots()
        for number, (arm, colour) in enumerate(zip(arms, _colours(), strict=False)):
            place = np.arange(len(values)) + (number - (len(arms) - 1) / 2) * 0.8 / len(arms)
            for x, group in zip(place, values.values(), strict=True):
                seeds = np.array([v for v in group.get(arm, ()) if np.isfinite(v)])
                axes.plot(np.full(len(seeds), x), seeds, "o", color=colour, markersize=4)
                if len(seeds):
                    axes.hlines(seeds.mean(), x - 0.3 / len(arms), x + 0.3 / len(arms), color=colour)
            axes.plot([], [], "o", color=colour, label=arm)
        if log:
            axes.set_yscale("log")
        axes.set_xticks(range(len(values)), list(values))
        axes.set_title(title)
        axes.legend(ncols=min(4, len(arms)))
        return figure


def _colours() -> list[str]:
    return list(COLOURS) * 8


def _mark(axes: Any, seeds: Sequence[pd.Series[float]], marks: Sequence[tuple[int, str]]) -> None:
    for step, text in marks:
        near = next((s for s in seeds if step in s.index and np.isfinite(s.loc[step])), None)
        if near is None:
            axes.axvline(step, color=SPIKE, linewidth=0.8, alpha=0.6)
        else:
            axes.plot([step], [near.loc[step]], "v", color=SPIKE, markersize=6)
        axes.annotate(
            text,
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=7,
            va="top",
            ha="right",
            color=SPIKE,
        )


def _near(lines: Mapping[str, Sequence[pd.Series[float]]], limit: float) -> bool:
    largest = [s[np.isfinite(s)].max() for series in lines.values() for s in series if np.isfinite(s).any()]
    return bool(largest) and max(largest) * 30 > limit


def _label_sites(axes: Any, sites: Sequence[str]) -> None:
    """All names where they fit, else an even choice of them; long ones keep their end, where they differ."""
    step = max(1, -(-len(sites) // 40))
    places = range(0, len(sites), step)
    axes.set_yticks(
        places, [name if len(name) <= 42 else "…" + name[-41:] for name in (sites[i] for i in places)]
    )

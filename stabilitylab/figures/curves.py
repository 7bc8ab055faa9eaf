"""Figures of values over steps and over depth, and of arms beside each other. style.py has their look, maps.py the maps.

Seeds are thin and their mean thick. A value that is not finite cannot be drawn at its place: it becomes a cross at the upper edge.
Figures are plain matplotlib figures, so that a notebook can keep working with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from stabilitylab.figures.lines import Lines, Mark, logarithmic, mean_of_seeds, together
from stabilitylab.figures.numbers import plain, positive, thinned
from stabilitylab.figures.palette import ALARM, colours
from stabilitylab.figures.style import STYLE, legend, log_axis, panel, say_not_recorded


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
    style: Mapping[str, Any] = STYLE,
) -> Figure:
    """Values over steps; several series under one label are seeds: thin, with their mean thick.

    Args:
        lines: label -> series with the step as index.
        log: logarithmic value axis, where the values allow it. "auto": where the largest is 30 times the median.
        base: of the logarithm.
        stairs: the value holds from one step to the next (loss scale) instead of moving there evenly.
        limit: a horizontal line and its name, drawn only where it is within a factor of 30 of the data.
        marks: label -> episodes, marked on the label's first series and shaded for as long as they last.
        style: matplotlib's settings.
    """
    drawn = {label: [thinned(s) for s in several if len(s)] for label, several in lines.items()}
    every = together(s.to_numpy(dtype=float) for several in drawn.values() for s in several)
    with mpl.rc_context({**style}):
        figure, axes = panel()
        axes.set_title(title)
        if not every.size:
            say_not_recorded(axes)
            return figure
        way: dict[str, Any] = {"drawstyle": "steps-post"} if stairs else {}
        crosses = False
        for (label, several), colour in zip(drawn.items(), colours(), strict=False):
            for s in several:
                finite = s[np.isfinite(s)]
                look: dict[str, Any] = (
                    {"linewidth": 0.7, "alpha": 0.45} if len(several) > 1 else {"label": label}
                )
                # A single value has no line: it needs a dot.
                dot: dict[str, Any] = {"marker": "o", "markersize": 3} if len(finite) == 1 else {}
                axes.plot(finite.index, finite, color=colour, **look, **way, **dot)
                crosses |= _cross(axes, s.index[~np.isfinite(s)], colour)
            if len(several) > 1:
                mean = thinned(mean_of_seeds(lines[label]))
                axes.plot(mean.index, mean, color=colour, label=label, **way)
        scaled = logarithmic(log, every)
        if scaled:
            axes.set_yscale("log", base=base)
        _limit(axes, limit, every)
        if scaled:
            log_axis(axes.yaxis, base=base)
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plain(v)))
        # Shading reaches to the curve's own ends, not beyond them.
        axes.margins(x=0.01)
        for (label, several), colour in zip(drawn.items(), colours(), strict=False):
            _mark(axes, several, (marks or {}).get(label, ()), colour if len(drawn) > 1 else ALARM)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if crosses:
            axes.plot([], [], "x", color=style["text.color"], markersize=4, label="not finite")
        if len(drawn) > 1 or crosses:
            legend(figure, axes, columns=len(drawn) + crosses)
        return figure


def by_depth(
    values: Mapping[str, Sequence[pd.Series[float]]],
    *,
    title: str,
    unit: str = "",
    limit: tuple[float, str] | None = None,
    joined: bool = True,
) -> Figure:
    """Values by layer, counted from 0 in the order given. Several series under a label are seeds, or heads.

    Args:
        values: label -> series, one value a layer.
        joined: draw the mean of a label's series as a line; False: only a dot for each value (heads).
    """
    every = together(s.to_numpy(dtype=float) for several in values.values() for s in several)
    with mpl.rc_context(STYLE):
        figure, axes = panel()
        axes.set_title(title)
        if not every.size:
            say_not_recorded(axes)
            return figure
        for (label, several), colour in zip(values.items(), colours(), strict=False):
            layers = [s.reset_index(drop=True) for s in several if len(s)]
            for s in layers if len(layers) > 1 or not joined else ():
                finite = s[np.isfinite(s)]
                axes.plot(finite.index, finite, "o", color=colour, markersize=3, alpha=0.5, markeredgewidth=0)
            for s in layers:
                _cross(axes, s.index[~np.isfinite(s)], colour)
            if joined and layers:
                mean = mean_of_seeds(layers)
                axes.plot(mean.index, mean, "o-", color=colour, label=label, markersize=3)
            else:
                axes.plot([], [], "o", color=colour, label=label, markersize=3)
        if positive(every):
            axes.set_yscale("log")
        _limit(axes, limit, every, always=positive(every))
        if positive(every):
            log_axis(axes.yaxis)
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(values) > 1:
            legend(figure, axes, columns=len(values))
        return figure


def dots(
    values: Mapping[str, Mapping[str, Sequence[float]]], *, title: str, unit: str = "", log: bool = False
) -> Figure:
    """Groups of arms, one dot a seed and a bar at their mean: ``values[group][arm]``. Crosses are seeds that are not finite."""
    arms = list(dict.fromkeys(arm for group in values.values() for arm in group))
    every = together(np.array(seeds, dtype=float) for group in values.values() for seeds in group.values())
    with mpl.rc_context(STYLE):
        figure, axes = panel(2.5)
        axes.set_title(title)
        if not every.size:
            say_not_recorded(axes)
            return figure
        for number, (arm, colour) in enumerate(zip(arms, colours(), strict=False)):
            places = np.arange(len(values)) + (number - (len(arms) - 1) / 2) * 0.8 / len(arms)
            for x, group in zip(places, values.values(), strict=True):
                seeds = np.array(group.get(arm, ()), dtype=float)
                finite = seeds[np.isfinite(seeds)]
                axes.plot(np.full(len(finite), x), finite, "o", color=colour, markersize=4)
                _cross(axes, np.full(len(seeds) - len(finite), x), colour)
                if len(finite):
                    axes.hlines(finite.mean(), x - 0.3 / len(arms), x + 0.3 / len(arms), color=colour)
            axes.plot([], [], "o", color=colour, label=arm)
        if log and positive(every):
            axes.set_yscale("log")
            log_axis(axes.yaxis)
        axes.set_xticks(range(len(values)), list(values))
        axes.set_xlim(-0.6, len(values) - 0.4)
        axes.set_ylabel(unit)
        legend(figure, axes, columns=len(arms))
        return figure


def _cross(axes: Axes, places: Any, colour: str) -> bool:
    """Crosses at the upper edge; whether there were any."""
    if not len(places):
        return False
    edge = axes.get_xaxis_transform()
    axes.plot(
        places, np.full(len(places), 0.98), "x", color=colour, markersize=4, transform=edge, clip_on=False
    )
    return True


def _limit(axes: Axes, limit: tuple[float, str] | None, values: np.ndarray, *, always: bool = False) -> None:
    finite = values[np.isfinite(values)]
    if limit is None or not (always or (finite.size and finite.max() * 30 > limit[0])):
        return
    axes.axhline(limit[0], color=ALARM, linewidth=1, linestyle="--")
    where = (0.01, limit[0])
    axes.annotate(limit[1], where, xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color=ALARM)
    axes.margins(y=0.12)


def _mark(axes: Axes, several: Sequence[pd.Series[float]], marks: Sequence[Mark], colour: str) -> None:
    """Shade every episode, put a triangle above its onset, and name it where there is room for the name."""
    above = axes.transData + ScaledTranslation(0, 5 / 72, axes.get_figure(root=True).dpi_scale_trans)  # type: ignore[union-attr]
    left, right = axes.get_xlim()
    named = left - 1.0
    for mark in sorted(marks):
        end = right if mark.end is None else mark.end
        axes.axvspan(mark.onset, max(end, mark.onset), color=colour, alpha=0.18, linewidth=1)
        # Of several seeds, the episode happened in the one that stands out there.
        heights = [
            s.loc[mark.onset] for s in several if mark.onset in s.index and np.isfinite(s.loc[mark.onset])
        ]
        if heights:
            axes.plot([mark.onset], [max(heights)], "v", color=colour, markersize=5, transform=above)
        if mark.onset - named > 0.035 * (right - left):
            named = mark.onset
            style: dict[str, Any] = {
                "rotation": 90,
                "fontsize": 7,
                "va": "top",
                "ha": "right",
                "color": colour,
            }
            axes.annotate(mark.text, (mark.onset, 0.97), xycoords=("data", "axes fraction"), **style)
    axes.set_xlim(left, right)

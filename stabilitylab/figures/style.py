"""One quiet look for all figures.

Axes and text have one grey on a transparent ground; a page replaces that grey by its own ink (page.py), so that one figure serves
light and dark mode. Text is sized for a figure shown at about 1.6 times its size on a desk and at its own on a phone.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from stabilitylab.figures.numbers import plain
from stabilitylab.figures.palette import INK

WIDTH = 6.4

STYLE: dict[str, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
    "font.family": "sans-serif",
    "svg.fonttype": "path",
    "svg.hashsalt": "stabilitylab",
}

# On white and of the size of a card, where nothing replaces the grey: darker words.
ON_WHITE: dict[str, Any] = {
    **STYLE,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), "#3c3c3c"),
}


def panel(height: float = 2.7) -> tuple[Figure, Axes]:
    """An empty figure of the page's width; call inside ``rc_context(STYLE)``."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


# Letters an inch at the legend's size, and what a line's sample takes beside its name, in letters.
_LETTERS_AN_INCH, _HANDLE = 12, 6


def legend(figure: Figure, axes: Axes, *, columns: int) -> None:
    """Names of the curves below the axes: within the axes no place is free of curves in every run.

    Long names (a fork is named by all that it changed) get fewer columns, and are cut in their middle where they would not fit:
    axes that gave up their room to names would be no picture.
    """
    handles, names = axes.get_legend_handles_labels()
    room = int(figure.get_figwidth() * _LETTERS_AN_INCH)
    fitting = room // (max(map(len, names), default=0) + _HANDLE)
    # Four rows at most, of up to four columns.
    ncols = max(1, min(4, columns, max(fitting, -(-len(names) // 4))))
    figure.legend(handles, shortened(names, room // ncols - _HANDLE), loc="outside lower left", ncols=ncols)


def shortened(names: Sequence[str], most: int) -> list[str]:
    """Names of at most this many letters, cut in the middle; those that would be alike are numbered."""
    cut = [
        name if len(name) <= most else f"{name[: most // 2 - 1]} … {name[-(most - most // 2 - 2) :]}"
        for name in names
    ]
    return [
        one if cut.count(one) == 1 else f"{one[: most - 4]} ({cut[: i + 1].count(one)})"
        for i, one in enumerate(cut)
    ]


def save(figure: Figure, file: Any, **options: Any) -> None:
    """``figure.savefig``, which leaves neither warnings nor open files behind."""
    with tidy():
        figure.savefig(file, **options)


def save_pixels(figure: Figure, file: Any, *, dpi: int, ground: str) -> None:
    """A PNG in less time than ``savefig`` takes, which draws a figure once for its layout and once more for the file.

    Inside ``tidy``, which may be around several.
    """
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(dpi)
    figure.set_facecolor(ground)
    canvas.draw()
    imsave(file, np.asarray(canvas.buffer_rgba()), format="png", dpi=dpi)


@contextmanager
def tidy() -> Iterator[None]:
    """Draw without warnings and without open files left behind."""
    with warnings.catch_warnings():
        # A character that the font lacks (a module named in Chinese) becomes a box: that says it.
        warnings.filterwarnings("ignore", message="Glyph")
        yield
    fonts = getattr(font_manager, "_get_font", None)
    if fonts is not None and threading.current_thread() is not threading.main_thread():
        # matplotlib keeps font files open for each thread by itself, also when the thread has ended.
        fonts.cache_clear()


def say_not_recorded(axes: Axes) -> None:
    """What an empty picture says instead of nothing."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)


def log_axis(axis: Any, *, base: int = 10) -> None:
    """A logarithmic axis whose marks read 0.5, 20, 3,000 and not 2 x 10^1."""
    if base == 2:
        # A loss scale moves by factors of two, and people know it by its power.
        axis.set_major_locator(LogLocator(base=2, numticks=8))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"$2^{{{math.log2(v):.0f}}}$" if v > 0 else ""))
        axis.set_minor_locator(NullLocator())
        return
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if 0 < low < high else 0.0
    # Few decades: marks at 1, 2 and 5; many: at the powers alone.
    subs = (1.0, 2.0, 5.0) if decades < 3.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda v, _: plain(v)))
    axis.set_minor_formatter(NullFormatter())

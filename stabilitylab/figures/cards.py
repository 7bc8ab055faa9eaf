"""A map as a small picture, drawn in a few milliseconds: what ``maps.heat_map`` shows, in pixels.

matplotlib's axes find their ticks and their place by measuring every label over and over, some 80 ms a map; a run of a few seconds
has three at its end. Here the pixels of map and colour bar go into the figure as they are (``figimage``), and the words beside them
as text, whose room is measured once.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from matplotlib.transforms import IdentityTransform
from numpy.typing import NDArray

from stabilitylab.figures.map_cells import BROKEN, Cells, cells, named_sites
from stabilitylab.figures.numbers import plain
from stabilitylab.figures.style import ON_WHITE, shortened

SMALL, NAMES, LARGE = 8.0, 9.0, 10.0
# TensorBoard shrinks what is wider than its card: a few names in larger letters stay readable, thirty do not.
_NAMED = 16
_ROUND = (1, 2, 5, 10)
_GAP, _BAR = 5, 10
_CROSSES = 200


def map_card(
    matrix: pd.DataFrame,
    *,
    title: str,
    log: bool,
    recorded: pd.DataFrame,
    width: float = 4.9,
    dpi: int = 90,
) -> Figure:
    """A statistic at every site over the steps, made and saved inside ``style.tidy``.

    ``matrix``, ``log`` and ``recorded`` as of ``maps.heat_map``.

    Args:
        width: inches; the height follows from the sites.
        dpi: to save it with.
    """
    shown = cells(matrix, recorded=recorded)
    height = min(5.1, max(1.8, 1.27 + 0.15 * len(shown.sites)))
    with mpl.rc_context(ON_WHITE):
        card = _Card(width, height, dpi)
        card.write(_GAP, card.height - _GAP, title, size=LARGE, ha="left", va="top")
        broken = shown.known & ~np.isfinite(shown.values)
        finite = shown.values[np.isfinite(shown.values) & ((shown.values > 0) | (not log))]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.1, 1.0)
        high = high if high > low else low + max(abs(low) * 0.01, 1e-12)
        scale = (LogNorm if log else Normalize)(low, high, clip=True)
        marks = [(float(scale(v)), plain(v)) for v in _values(low, high, log=log)]
        rows = named_sites(shown.sites, _NAMED)
        names = shortened([shown.sites[row] for row in rows], 32)
        left = 2 * _GAP + max((card.room(name, NAMES) for name in names), default=0)
        right = card.width - _BAR - 3 * _GAP - max((card.room(words) for _, words in marks), default=0)
        bottom, top = 3 * card.line, card.height - int(2.2 * card.line)
        size = max(right - left, 40), max(top - bottom, 10)

        pixels = np.ones((*shown.values.shape, 3))
        known = np.isfinite(shown.values)
        pixels[known] = mpl.colormaps["viridis"](scale(np.clip(shown.values[known], low, high)))[:, :3]
        pixels[broken] = to_rgb(BROKEN)
        card.paste(pixels, left, bottom, size)
        card.paste(
            mpl.colormaps["viridis"](np.linspace(0, 1, 256))[:, None, :3],
            left + size[0] + _GAP,
            bottom,
            (_BAR, size[1]),
        )
        for share, words in marks:
            place = left + size[0] + 2 * _GAP + _BAR, bottom + share * size[1]
            card.write(*place, words, ha="left", va="center")
        for row, name in zip(rows, names, strict=True):
            place = left - _GAP, bottom + (row + 0.5) * size[1] / len(shown.sites)
            card.write(*place, name, ha="right", va="center", size=NAMES)
        for share, words in _steps(shown):
            card.write(left + share * size[0], bottom - _GAP, words, ha="center", va="top")
        across = "step; red: not finite" if broken.any() else "step"
        card.write(left + size[0] / 2, bottom - _GAP - int(1.3 * card.line), across, ha="center", va="top")
        card.cross(np.argwhere(broken), left, bottom, size, shown.values.shape)
        return card.figure


class _Card:
    """A figure whose unit is the pixel."""

    def __init__(self, width: float, height: float, dpi: int) -> None:
        self.figure = Figure(figsize=(width, height), dpi=dpi)
        self.width, self.height = int(width * dpi), int(height * dpi)
        self.line = round(1.3 * SMALL * dpi / 72)
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()
        self._fonts: dict[float, FontProperties] = {}

    def room(self, words: str, size: float = SMALL) -> int:
        """How many pixels words are wide."""
        font = self._fonts.setdefault(size, FontProperties(size=size))
        width: float = self._renderer.get_text_width_height_descent(words, font, ismath=False)[0]
        return round(width)

    def write(self, x: float, y: float, words: str, *, ha: str, va: str, size: float = SMALL) -> None:
        """Words at a place."""
        place = x / self.width, y / self.height
        self.figure.text(*place, words, ha=ha, va=va, fontsize=size, parse_math=False)

    def paste(self, pixels: NDArray[np.float64], left: int, bottom: int, size: tuple[int, int]) -> None:
        """Cells [rows, columns, 3], the lowest row first, stretched over this many pixels."""
        rows = np.arange(size[1]) * pixels.shape[0] // size[1]
        columns = np.arange(size[0]) * pixels.shape[1] // size[0]
        self.figure.figimage(pixels[rows][:, columns], left, bottom, origin="lower")

    def cross(
        self,
        places: NDArray[np.intp],
        left: int,
        bottom: int,
        size: tuple[int, int],
        shape: tuple[int, ...],
    ) -> None:
        """A white cross on each of these cells, where they are few enough to be told apart."""
        if 0 < len(places) <= _CROSSES:
            x = left + (places[:, 1] + 0.5) * size[0] / shape[1]
            y = bottom + (places[:, 0] + 0.5) * size[1] / shape[0]
            crosses = Line2D(
                x, y, linestyle="none", marker="x", color="white", markersize=3, markeredgewidth=0.8
            )
            crosses.set_transform(IdentityTransform())
            self.figure.add_artist(crosses)


def _values(low: float, high: float, *, log: bool) -> list[float]:
    """The values to name beside the colour bar, low to high."""
    if log and low > 0:
        subs: Sequence[float] = (1.0, 2.0, 5.0) if high / low < 3000 else (1.0,)
        found = LogLocator(subs=subs, numticks=9).tick_values(low, high)
        inside = [float(v) for v in found if low <= v <= high]
        if inside:
            return inside
    found = MaxNLocator(5, steps=_ROUND).tick_values(low, high)
    return [float(v) for v in found if low <= v <= high]


def _steps(shown: Cells) -> list[tuple[float, str]]:
    """Where across the map to name which step, as a share of its width."""
    left, right = shown.stretch
    if shown.even:
        found = MaxNLocator(7, integer=True, steps=_ROUND).tick_values(left, right)
        return [((v - left) / (right - left), f"{v:,.0f}") for v in found if left <= v <= right]
    places = np.unique(np.linspace(0, len(shown.steps) - 1, min(6, len(shown.steps))).round().astype(int))
    return [((int(i) - left) / (right - left), str(shown.steps[i])) for i in places]

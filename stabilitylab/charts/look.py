"""One look for all charts, and what a page embeds of them.

A chart is Bokeh's JSON; the page embeds its library once (1.3 MB), so it needs no network. Colours that must differ on dark ground
are stand-ins in the JSON, and the page's script puts the reader's in their place before drawing.

Names come from runs. Bokeh shows hovered values as text, and takes ``$$`` for TeX, for which it would fetch a library; so labels go
through ``words``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stabilitylab.figures.palette import ALARM, COLOURS

if TYPE_CHECKING:
    from bokeh.plotting import figure as BokehFigure

# Stand-ins for the page's own colours: text, lines of the grid, ground.
INK, GRID, PAPER = "#010203", "#010204", "#010205"
LIGHT = {INK: "#4a4a50", GRID: "#e4e4e8", PAPER: "#ffffff"}
DARK = {
    INK: "#c4c4ca",
    GRID: "#34343a",
    PAPER: "#161618",
    COLOURS[0]: "#4aa3df",
    ALARM: "#ff7f2a",
    COLOURS[5]: "#ff7f2a",
}
HEIGHT = 300
# A logarithmic scale that marks each digit of each power crowds at its upper ends: then only 1, 2 and 5 are named.
_PLAIN = """
const a = Math.abs(tick)
const round = t => [1, 2, 5].includes(Number((t / 10 ** Math.floor(Math.log10(t) + 1e-9)).toPrecision(6)))
if (LOG && ticks.length > 6 && !round(tick) && ticks.filter(round).length > 1) return ''
if (tick !== 0 && (a < 1e-3 || a >= 1e6)) return tick.toExponential(2).replace(/\\.?0+e/, 'e').replace('e+', 'e')
return Number(tick.toPrecision(6)).toLocaleString('en', {maximumSignificantDigits: 6})
"""
_POWER_OF_TWO = """
const power = Math.round(Math.log2(tick))
const digits = {'-': '⁻', 0: '⁰', 1: '¹', 2: '²', 3: '³', 4: '⁴', 5: '⁵', 6: '⁶', 7: '⁷', 8: '⁸', 9: '⁹'}
return '2' + String(power).split('').map(d => digits[d]).join('')
"""


class Entry(NamedTuple):
    """What a name in a legend stands for."""

    colour: str
    shown: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart with what a reader should see in it.

    Attributes:
        figure: Bokeh's.
        caption: below it.
        choices: what a reader can switch between: a name a reader understands -> the column of the source ``choice`` that is shown.
        chosen: the name shown first.
        legend: name -> its colour and the identities of what it hides or shows; page text, for names wrap where a canvas cuts them.
    """

    figure: BokehFigure
    caption: str = ""
    choices: Mapping[str, str] = field(default_factory=dict)
    chosen: str = ""
    legend: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return str(self.figure.name)

    def json(self) -> str:
        """What the page's script draws, safe inside a script element."""
        from bokeh.embed import json_item

        return json.dumps(json_item(self.figure), separators=(",", ":")).replace("<", "\\u003c")


def library() -> str:
    """Bokeh's own script, whole."""
    from bokeh.resources import Resources

    script: str = Resources(mode="inline", components=["bokeh"]).js_raw[0]
    return script


def colours() -> Iterator[str]:
    """The palette, over and over."""
    return cycle(COLOURS)


def words(text: object) -> str:
    """A text as a label, without what Bokeh would take for TeX."""
    return str(text).replace("$$", "$\u200b$").replace("\\[", "\\\u200b[").replace("\\(", "\\\u200b(")


def panel(title: str, *, x: str = "step", y: str = "", height: int = HEIGHT, **options: Any) -> BokehFigure:
    """An empty chart of the page's width. Options as of ``bokeh.plotting.figure``."""
    from bokeh.models import BoxZoomTool, PanTool, ResetTool, SaveTool, WheelZoomTool
    from bokeh.plotting import figure

    tools = [BoxZoomTool(), PanTool(), WheelZoomTool(), ResetTool(), SaveTool()]
    # Nothing is active before the page's script says so: on a phone a drag moves the page.
    made = figure(
        name=words(title),
        height=height,
        sizing_mode="stretch_width",
        tools=tools,
        active_drag=None,
        active_scroll=None,
        active_tap=None,
        toolbar_location="above",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        x_axis_label=words(x),
        y_axis_label=words(y) or None,
        output_backend="canvas",
        **options,
    )
    made.toolbar.logo = None
    made.toolbar.autohide = True
    made.min_border_right = 12
    made.min_border_left = 62  # so that steps of one chart stand above the same steps of the next
    for axis in (*made.xaxis, *made.yaxis):
        axis.axis_label_text_color = axis.major_label_text_color = INK
        axis.axis_label_text_font_style, axis.axis_label_text_font_size = "normal", "12px"
        axis.major_label_text_font_size = "12px"
        axis.axis_line_color = axis.major_tick_line_color = GRID
        axis.minor_tick_line_color = None
    for grid in made.grid:
        grid.grid_line_color = GRID
    return made


def hover(
    made: BokehFigure, renderers: Sequence[Any], tooltips: Sequence[tuple[str, str]], **options: Any
) -> None:
    """Show these values where the pointer is."""
    from bokeh.models import HoverTool

    made.add_tools(
        HoverTool(renderers=list(renderers), tooltips=list(tooltips), point_policy="snap_to_data", **options)
    )


def number_axis(axis: Any, *, base: int = 10) -> None:
    """Marks that read 0.5, 20, 3,000; powers of two as such."""
    from bokeh.models import CustomJSTickFormatter, LogAxis, LogTicker

    plain = _PLAIN.replace("LOG", "true" if isinstance(axis, LogAxis) else "false")
    axis.formatter = CustomJSTickFormatter(code=_POWER_OF_TWO if base == 2 else plain)
    if base == 2:
        axis.ticker = LogTicker(base=2, desired_num_ticks=6)


def step_axis(axis: Any) -> None:
    """Steps are whole: 12,000."""
    from bokeh.models import BasicTicker, NumeralTickFormatter

    axis.formatter = NumeralTickFormatter(format="0,0")
    axis.ticker = BasicTicker(min_interval=1, desired_num_ticks=7)


def legend_of(entries: Mapping[str, Sequence[Any]]) -> dict[str, Entry]:
    """Names under the chart, each with its colour and with what a click on it hides or shows."""
    return {
        name: Entry(colour, tuple(one.id for one in shown))
        for (name, shown), colour in zip(entries.items(), colours(), strict=False)
        if shown
    }


def not_recorded(made: BokehFigure) -> None:
    """What an empty chart says instead of nothing."""
    from bokeh.models import Label, Range1d

    made.x_range, made.y_range = Range1d(0, 1), Range1d(0, 1)
    made.axis.visible = made.grid.visible = False
    made.add_layout(Label(x=0.5, y=0.5, text="not recorded", text_align="center", text_color=INK))


def ceiling(values: np.ndarray, *, log: bool) -> float:
    """Where to mark a value that is not finite: at the upper edge of those that are."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 1.0
    high, low = float(finite.max()), float(finite.min())
    if log and low > 0:
        return float(high * max((high / low) ** 0.06, 1.02))
    return high + 0.06 * ((high - low) or abs(high) or 1.0)


def constant_in_view(made: BokehFigure, values_N: NDArray[np.float64], *, log: bool) -> None:
    """Fits an axis to a constant: Bokeh gives it a span of 2, and a rate of 3e-4 lies on 0."""
    if not log:
        largest = float(np.abs(values_N[np.isfinite(values_N)]).max(initial=0.0))
        made.y_range.default_span = largest or 2.0

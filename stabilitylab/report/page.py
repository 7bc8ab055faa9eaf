"""One page, one file: sections of text, tables and figures as self-contained HTML.

Nothing is loaded from elsewhere: charts bring their library along. jinja2 escapes text from runs (names, paths, event data).
Figures are inline SVG, or PNG where a map has so many cells that SVG would be larger.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from stabilitylab.charts.look import DARK, LIGHT, Chart, library
from stabilitylab.command_line.whole_file import whole_file
from stabilitylab.figures.palette import ALARM, COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG_BYTES = 200_000
# Colours of figures that a page's style sheet may set: they need another shade on dark ground.
_PAGE_COLOURS = {INK: "currentColor", COLOURS[0]: "var(--blue)", ALARM: "var(--alarm)"}


@dataclass(frozen=True, kw_only=True)
class TableCell:
    """One cell: its text, whether it is the best of its row, and a second, smaller line."""

    text: str
    best: bool = False
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        columns: headings.
        rows: first cell a heading of its row.
        note: a sentence under it.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[TableCell | str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure, and what a reader should see in it."""

    figure: Figure
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Said:
    """One thing to know, in a sentence.

    Attributes:
        word: what it comes down to, set apart before it: a verdict, a cause.
        text: the sentence.
        detail: a second, smaller line.
        tone: how it looks: "good", "bad", "even" or "open".
    """

    word: str
    text: str
    detail: str = ""
    tone: str = "open"


@dataclass(frozen=True, kw_only=True)
class Statements:
    """Things to know, one below the other."""

    said: Sequence[Said]
    note: str = ""


Content = Table | Picture | Chart | Statements


@dataclass(kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading and entry in the contents.
        text: paragraphs.
        parts: tables, pictures, charts and statements, in order.
    """

    title: str
    text: Sequence[str] = ()
    parts: Sequence[Content] = ()


@dataclass(kw_only=True)
class Page:
    """A report.

    Attributes:
        title: heading.
        lead: the first paragraph: what was asked, or what this is.
        facts: small print beside it: name -> value.
        sections: its body.
    """

    title: str
    lead: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)

    def html(self) -> str:
        """The whole page."""
        template = _environment().get_template("page.html.jinja")
        charts = any(isinstance(part, Chart) for section in self.sections for part in section.parts)
        return template.render(
            page=self,
            css=Markup(_here("page.css")),
            colours=Markup(json.dumps({"dark": {**LIGHT, **DARK}, "light": LIGHT})),
            # Scripts cannot be escaped; neither holds the end of its element (a test says so).
            scripts=[Markup(library()), Markup(_here("page.js"))] if charts else [],
        )

    def write(self, path: Path) -> Path:
        """Write the page under its name only when it is whole, and return its path.

        Raises what ``whole_file`` raises.
        """
        text = self.html()
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
        return path


def picture_html(figure: Figure) -> Markup:
    """A figure as inline SVG in the page's own ink, or as PNG where that is smaller."""
    import matplotlib as mpl  # only pages of figures load it

    from stabilitylab.figures.style import STYLE, save

    title = "; ".join(axes.get_title("left") or axes.get_title() for axes in figure.axes).strip("; ")
    vector = io.StringIO()
    with mpl.rc_context(STYLE):  # the same figure gives the same file
        save(figure, vector, format="svg", metadata={"Date": None})
    text = vector.getvalue()
    if len(text) <= SVG_BYTES:
        text = text[text.index("<svg") :]
        for colour, name in _PAGE_COLOURS.items():
            text = text.replace(colour.lower(), name)
        # matplotlib escapes the texts it draws; the title goes through Markup.
        label = Markup('<svg role="img" aria-label="{}"').format(title)
        return label + Markup(text.removeprefix("<svg"))
    raster = io.BytesIO()
    save(figure, raster, format="png", dpi=160)
    encoded = base64.b64encode(raster.getvalue()).decode()
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(title, encoded)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["picture"] = picture_html
    environment.filters["chart"] = lambda chart: Markup(chart.json())
    environment.tests["table"] = lambda part: isinstance(part, Table)
    environment.tests["chart"] = lambda part: isinstance(part, Chart)
    environment.tests["statements"] = lambda part: isinstance(part, Statements)
    environment.tests["cell"] = lambda cell: isinstance(cell, TableCell)
    return environment


def _here(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")

"""What ``bearing`` found, for the page: decision first, then which layer breaks by what."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from stabilitylab.figures.style import STYLE, WIDTH
from stabilitylab.outliers import words
from stabilitylab.outliers.bearing import FACTOR, FORMATS, ROWS, Bearing
from stabilitylab.report.page import Picture, Said, Section, Statements, Table

_MOST = 40
_NAMES = {
    "int8-tensor": "int8, one scale a tensor",
    "int8-row": "int8, a scale a token",
    "fp8-e4m3-tensor": "FP8 E4M3, one scale a tensor",
    "mxfp8-e4m3": "MXFP8",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
}


def bearing_section(found: Bearing) -> Section:
    """The section."""
    said = []
    for name in FORMATS:
        broken = sum(not layer.bears(name) for layer in found.layers)
        tone = "good" if not broken else "bad" if broken > len(found.layers) / 10 else "open"
        said.append(Said(word=_NAMES[name], text=found.sentence(name), tone=tone))
    rows = []
    broken_ones = [(layer, name, why) for layer in found.layers for name, why in layer.broken.items()]
    for layer, name, why in sorted(broken_ones, key=lambda one: -one[0].plain[one[1]]):
        rows.append(
            [
                layer.path,
                name,
                words.short(layer.plain[name]),
                why.cause,
                why.detail,
                words.short(layer.rotated[name]),
                words.short(layer.smoothed[name]),
            ]
        )
    columns = ["layer", "format", "error", "broken by", "what was seen", "rotated", "smoothed"]
    note = (
        f"Errors are over those on normal numbers: 1 is usual, {FACTOR:g} the limit, where outliers have cost a bit. "
        + (f"The {_MOST} largest of {len(rows)}; --json has all." if len(rows) > _MOST else "")
    )
    parts: list[Any] = [Statements(said=said), Picture(figure=_map(found), caption=_CAPTION)]
    if rows:
        parts.append(Table(columns=columns, rows=rows[:_MOST], note=note))
    return Section(
        title="Which formats each layer tolerates",
        text=(
            "To store or compute in fewer bits, numbers are rounded to those that a format has, under scales that some of them "
            "share. One that is far larger than its neighbours coarsens all of them. A layer bears a format if rounding its input "
            f"and its weight costs less than {FACTOR:g} times what it costs on numbers without outliers.",
            "A layer broken by its first token can keep that token's values apart, or take a scale a token; one broken by steady "
            "channels needs its channels scaled (smoothing), rotated, or kept in 16 bits. "
            f"Measured on the first {ROWS} tokens of one window.",
        ),
        parts=parts,
    )


def decision_sentence(found: Bearing) -> str:
    """Which formats the model bears, for the first line of the page."""
    several = len(found.layers)
    bearing = {name: sum(layer.bears(name) for layer in found.layers) for name in FORMATS}
    whole = [_NAMES[name] for name, count in bearing.items() if count == several]
    broken = [
        f"{_NAMES[name]} breaks {several - count}" for name, count in bearing.items() if count < several
    ]
    first = (
        f"All {several} linear layers tolerate {_listed(whole)}" if whole else f"Of {several} linear layers"
    )
    return "; ".join([first, *broken]) + "."


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


_CAPTION = "Layers in the model's order. White is what normal numbers have, dark blue eight times as much; the limit is twice."


def _map(found: Bearing) -> Figure:
    values = np.array([[layer.plain[name] for layer in found.layers] for name in FORMATS])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.0 + 0.24 * len(FORMATS)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(
            np.log2(np.maximum(values, 1.0)),
            aspect="auto",
            cmap="Blues",
            vmin=0,
            vmax=3,
            interpolation="nearest",
        )
        axes.set_yticks(range(len(FORMATS)), FORMATS)
        axes.set_xlabel("layer")
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, ticks=[0, 1, 2, 3])
        bar.ax.set_yticklabels(["1x", "2x", "4x", "8x"])
        axes.set_title("Error over that on normal numbers")
    return figure

"""A log's loss (and gradient norm, where it has one) with its episodes marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from stabilitylab.spikes.log_scan import Scan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart too.
COLOURS: Mapping[str, str] = {
    "hard-batch": "#999999",
    "spike": "#E69F00",
    "divergence": "#D55E00",
    "non-finite": "#CC79A7",
    "loss-scale-collapse": "#0072B2",
    "dead": "#000000",
    "frozen": "#009E73",
}


def draw(scan: Scan, title: str) -> Figure:
    """One panel per curve, over the steps; episodes as spans through all panels."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = len(scan.outlines)
    figure = Figure(figsize=(10, 1.2 + 2.6 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, outline) in zip(axes, scan.outlines.items(), strict=True):
        steps, low, high = outline.curve()
        order = np.argsort(steps, kind="stable")
        axis.fill_between(steps[order], low[order], high[order], color="#56B4E9", alpha=0.5, linewidth=0)
        axis.plot(steps[order], high[order], color="#1f2933", linewidth=0.7)
        positive = high[high > 0]
        if len(positive) == len(high) and len(high) and high.max() > 30 * np.median(high):
            axis.set_yscale("log")
        axis.set_ylabel(name, parse_math=False)
        axis.margins(x=0.01)
        for episode in scan.episodes:
            end = episode.onset if episode.end is None else episode.end
            axis.axvspan(episode.onset, end, color=COLOURS[episode.kind], alpha=0.6, linewidth=1.5)
    axes[-1].set_xlabel("step")
    axes[0].set_title(title, loc="left", parse_math=False)
    seen = [kind for kind in COLOURS if any(episode.kind == kind for episode in scan.episodes)]
    if seen:
        handles = [Line2D([], [], color=COLOURS[kind], linewidth=5, label=kind) for kind in seen]
        axes[0].legend(handles=handles, loc="upper right", fontsize="small")
    return figure

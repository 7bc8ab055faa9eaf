"""Figures of a scan: layers by channels, and statistics over depth. Plain matplotlib figures in the report's look."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from stabilitylab.figures.curves import by_depth
from stabilitylab.figures.maps import heat_map
from stabilitylab.outliers.channels import ChannelStatistics
from stabilitylab.outliers.scan import OutlierScan

MOST_CHANNELS = 96


def channel_map(scan: OutlierScan, role: str, *, highest: float | None = None) -> Figure:
    """Channel maximum over the site's median channel, layers up and the most prominent channels across.

    Channels stand in one order for all layers, the one that is largest in any layer first, so a channel that stands out everywhere
    is a vertical line. Outliers are few: all channels at once would make them a hair's breadth wide.

    Args:
        role: which place in the block.
        highest: end of the colour scale; by default the largest ratio of this role.
    """
    seen = [(site, one) for site, one in scan.roles()[role] if site.layer is not None]
    times_LC = np.nan_to_num(np.stack([one.times_median for _, one in seen]), nan=0.0, posinf=np.inf)
    order = np.argsort(-times_LC.max(0), kind="stable")[:MOST_CHANNELS]
    frame = pd.DataFrame(times_LC[:, order], index=[f"layer {site.layer}" for site, _ in seen], columns=order)
    finite = times_LC[np.isfinite(times_LC)]
    top = highest if highest is not None else float(finite.max()) if finite.size else 1.0
    # The median channel is 1: the map does not tell apart what lies below it.
    return heat_map(
        frame,
        title=f"{role}: channel maximum over the median channel's, {len(order)} of {times_LC.shape[1]:,} channels",
        limits=(1.0, max(top, 1.01)),
        across="number of the channel, the most prominent first",
    )


def recurring_roles(scan: OutlierScan) -> list[str]:
    """Places with the same width in two layers or more, the most prominent first."""
    peaks = {}
    for role, seen in scan.roles().items():
        widths = {one.channels for _, one in seen}
        if len(seen) > 1 and len(widths) == 1:
            peaks[role] = max(float(np.nanmax(one.times_median, initial=0.0)) for _, one in seen)
    return sorted(peaks, key=lambda role: -peaks[role])


def depth_figures(scan: OutlierScan) -> list[tuple[Figure, str]]:
    """Channel maximum over median, largest magnitude, and kurtosis by layer, each with its caption."""
    statistics: tuple[tuple[str, str, Callable[[ChannelStatistics], float]], ...] = (
        ("Largest channel over the median channel", "×", lambda one: float(one.times_median.max())),
        (
            "The same without the windows' first positions",
            "×",
            lambda one: float(one.elsewhere_over_median.max()),
        ),
        ("Largest magnitude", "|x|", lambda one: one.absmax),
        ("Kurtosis of all values", "", lambda one: one.kurtosis),
    )
    captions = (
        "How much of a per-tensor scale a single channel takes. One: all channels alike.",
        "What is left when the first token, on which attention rests, is kept out of the scale.",
        "The range that a number format must hold.",
        "3 for a Gaussian; large where few values carry most of the spread. The criterion of quantizable transformers "
        "(Bondarenko et al., arXiv:2306.12929).",
    )
    drawn = []
    for (title, unit, statistic), caption in zip(statistics, captions, strict=True):
        lines = {role: [series] for role, series in scan.by_depth(statistic).items()}
        if lines:
            drawn.append((by_depth(lines, title=title, unit=unit), caption))
    return drawn

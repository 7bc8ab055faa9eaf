"""Each episode from near: in a run of 100,000 steps a spike is one pixel, and how it came and went is what one wants to see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from stabilitylab.charts.curves import curves
from stabilitylab.charts.look import Chart
from stabilitylab.figures.curves import Mark
from stabilitylab.report.page import Section
from stabilitylab.runs.run import Run
from stabilitylab.spikes import Episode, episodes_of
from stabilitylab.telemetry import GRADIENT_NORM, LOSS

AROUND = (
    100  # steps before the first value out of line and after the last, or after the first where it lasts long
)
MOST = 6
_SHOWN = ((LOSS, "Loss", "nats"), (GRADIENT_NORM, "Gradient norm", ""))
# An episode that fills the curve above is seen there.
_WHOLE = 3 * AROUND


def close_ups(run: Run) -> Section | None:
    """Loss and gradient norm around the gravest episodes, in the order in which they came; None where there is nothing to
    show that the whole curve does not."""
    series = {metric: run.series(metric) for metric, _, _ in _SHOWN}
    longest = max((len(one) for one in series.values()), default=0)
    episodes = episodes_of(run.events)
    places = _places(episodes)
    if not places or longest <= _WHOLE:
        return None
    parts: list[Chart] = []
    for first, last in places:
        for metric, title, unit in _SHOWN:
            window = series[metric].loc[first:last]
            if not len(window):
                continue
            marks = [
                Mark(e.onset, _end(e, last), e.kind)
                for e in episodes
                if e.signal == metric and first <= e.onset <= last
            ]
            chart = curves(
                {run.name: [window]},
                title=f"{title}, steps {window.index[0]:,} to {window.index[-1]:,}",
                unit=unit,
                log="auto" if metric == LOSS else True,
                marks={run.name: marks},
            )
            parts.append(chart)
    if not parts:
        return None
    text = f"{AROUND} steps on either side of each episode" + (
        f"; the gravest of {len(episodes)} are shown." if len(places) == MOST else "."
    )
    return Section(title="Episodes from near", text=(text,), parts=parts)


def _places(episodes: Sequence[Episode]) -> list[tuple[int, int]]:
    """First and last step of each window; episodes that share one are shown once."""
    gravest = sorted(episodes, key=lambda e: (e.kind == "hard-batch", -_height(e)))
    windows: list[tuple[int, int]] = []
    for one in gravest:
        if any(first <= one.onset <= last for first, last in windows):
            continue
        if len(windows) == MOST:
            break
        end = one.onset if one.end is None else min(max(one.end, one.onset), one.onset + AROUND)
        windows.append((max(0, one.onset - AROUND), end + AROUND))
    return sorted(windows)


def _height(episode: Episode) -> float:
    """What is not finite is above all."""
    return float(episode.height) if episode.height is not None and np.isfinite(episode.height) else np.inf


def _end(episode: Episode, last: int) -> int | None:
    return episode.end if episode.end is not None and episode.end <= last else None


def extremes(loss: pd.Series[float]) -> str:
    """Where a curve was highest and lowest between its ends, in words; nothing where the ends say it."""
    finite = loss[np.isfinite(loss)]
    if finite.empty:
        return ", none of it finite"
    said = []
    high, low = finite.max(), finite.min()
    if high > max(finite.iloc[0], finite.iloc[-1]):
        said.append(f"its highest {high:.4g} at step {finite.idxmax():,}")
    if low < min(finite.iloc[0], finite.iloc[-1]):
        said.append(f"its lowest {low:.4g} at step {finite.idxmin():,}")
    words = f", {' and '.join(said)}" if said else ""
    if bad := len(loss) - len(finite):
        words += f"; {bad:,} {'value is' if bad == 1 else 'values are'} not finite"
    return words

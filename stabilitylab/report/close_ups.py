"""Each episode from near: in a run of 100,000 steps a spike is one pixel, and readers want to see how it came and went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from stabilitylab.charts.curves import curves
from stabilitylab.charts.look import Chart
from stabilitylab.figures.lines import Mark
from stabilitylab.report.episodes_section import diagnoses
from stabilitylab.report.page import Section
from stabilitylab.runs.run import Run
from stabilitylab.spikes import Episode, episodes_of
from stabilitylab.telemetry import GRADIENT_NORM, LOSS

AROUND = (
    100  # steps before the first value out of line and after the last, or after the first where it lasts long
)
MOST = 6
MOST_SIGNALS = 4
_SHOWN = ((LOSS, "Loss"), (GRADIENT_NORM, "Gradient norm"))
# The curve above shows an episode that fills it.
_WHOLE = 3 * AROUND


def close_ups(run: Run) -> Section | None:
    """The gravest episodes, in the order in which they came, each with loss, gradient norm and what left its baseline first around
    it; None where the whole curve shows all of that."""
    series = {metric: run.series(metric) for metric, _ in _SHOWN}
    longest = max((len(one) for one in series.values()), default=0)
    episodes = episodes_of(run.events)
    if not episodes or longest <= _WHOLE:
        return None
    steps = [step for one in series.values() if len(one) for step in (one.index[0], one.index[-1])]
    places = _places(episodes, int(min(steps)), int(max(steps)))
    found = diagnoses(run)
    parts: list[Chart] = []
    for first, last in places:
        around = f", steps {first:,} to {last:,}"
        named = _named(episodes, first, last)
        for metric, title in _SHOWN:
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
                title=f"{named}: {title.lower()}{around}",
                unit=run.loss_unit if metric == LOSS else "",
                log="auto" if metric == LOSS else True,
                marks={run.name: marks},
            )
            parts.append(chart)
        if (suspects := _suspects(run, found, first, last)) is not None:
            parts.append(suspects)
    if not parts:
        return None
    text = f"{AROUND} steps on either side of each episode" + (
        f"; the gravest of {len(episodes)} are shown." if len(places) == MOST else "."
    )
    return Section(title="Episodes from near", text=(text,), parts=parts)


def _suspects(run: Run, found: Sequence[Mapping[str, Any]], first: int, last: int) -> Chart | None:
    """The signals that left their baseline around the window's first episode, each over its median before it."""
    told = next(
        (one for one in found if first <= one["episode"]["onset"] <= last and one["departures"]), None
    )
    if told is None:
        return None
    onset = told["episode"]["onset"]
    lines = {}
    for one in told["departures"][:MOST_SIGNALS]:
        rows = run.near(one["family"], one["statistic"], first, last)
        rows = rows[rows["site"] == one["site"]]
        signal = rows.groupby("step")["value"].max()
        usual = signal[signal.index < onset - 1].median()
        if len(signal) > 1 and np.isfinite(usual) and usual > 0:
            lines[f"{one['family']}/{one['site']}/{one['statistic']}"] = [signal / usual]
    if not lines:
        return None
    title = f"What left its baseline, over its median before, steps {first:,} to {last:,}"
    return curves(lines, title=title, unit="times", log=True)


def _named(episodes: Sequence[Episode], first: int, last: int) -> str:
    """ "Spike at step 61,235": the gravest that begins in a window, whose charts bear its name."""
    inside = [one for one in episodes if first <= one.onset <= last]
    one = min(inside, key=lambda e: (e.kind == "hard-batch", -_height(e)))
    return f"{one.kind.replace('-', ' ').capitalize()} at step {one.onset:,}"


def _places(episodes: Sequence[Episode], begin: int, stop: int) -> list[tuple[int, int]]:
    """First and last step of each window, within the run's own (begin, stop); episodes that share a window are shown once."""
    gravest = sorted(episodes, key=lambda e: (e.kind == "hard-batch", -_height(e)))
    windows: list[tuple[int, int]] = []
    for one in gravest:
        if any(first <= one.onset <= last for first, last in windows):
            continue
        if len(windows) == MOST:
            break
        end = one.onset if one.end is None else min(max(one.end, one.onset), one.onset + AROUND)
        windows.append((max(begin, one.onset - AROUND), min(end + AROUND, stop)))
    return sorted(windows)


def _height(episode: Episode) -> float:
    """The episode's height; what is not finite is above all."""
    return float(episode.height) if episode.height is not None and np.isfinite(episode.height) else np.inf


def _end(episode: Episode, last: int) -> int | None:
    return episode.end if episode.end is not None and episode.end <= last else None


def course(loss: pd.Series[float], unit: str = "") -> str:
    """Where a curve of one value or more began, ended, and was highest and lowest, in words."""
    unit = f" {unit}" if unit else ""
    if len(loss) == 1:
        return f"the loss was {loss.iloc[0]:.4g}{unit} at its only step"
    return f"the loss went from {loss.iloc[0]:.4g} to {loss.iloc[-1]:.4g}{unit}{_extremes(loss)}"


def _extremes(loss: pd.Series[float]) -> str:
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

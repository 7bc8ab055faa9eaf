"""Which site left its own baseline, and when: departures around a step.

For each site the logarithm y of a positive statistic (a norm, a maximum) is followed over the ``WINDOW`` steps before the
onset. Its baseline is a straight line through the medians of the window's halves, but no lower than the second of them (a
falling norm that levels off has not left anything), its noise 1.4826 times the median absolute deviation from the line. It
is *out* where

    y - baseline > max(5 noise, ln 2)

(5, since some thousand sites are looked at for a dozen steps: a Gaussian passes that once in 3.5 million.)
The medians are blind to a departure that takes up less than half of the window's second half, so a site that left early
is measured against what it was before it did. A *departure* is the run of values out that touches the steps from 8 before
the onset (StableAdamW, 2304.13013, section 3.4: loss spikes follow within 1 to 8 steps) to 3 after it, followed back to
its beginning; a single value inside does not interrupt it. Non-finite values are out.

Sites are seen at the steps they were measured at; between two measurements a departure cannot be placed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stabilitylab.runs import Run
from stabilitylab.telemetry import SCALAR

WINDOW = 128
BEFORE = 8
AFTER = 3
LEAST_VALUES = 12
SIGMAS = 5.0
LEAST_RISE = float(np.log(2))

# What is followed, in the order in which a step computes it: forward, backward, update.
FOLLOWED = (
    ("attention", "score_max"),
    ("activation", "absmax"),
    ("activation_gradient", "rms"),
    ("gradient", "l2"),
    ("update", "rms"),
)
ORDER = {family: place for place, (family, _) in enumerate(FOLLOWED)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeOnset:
    """A site out of its baseline.

    Attributes:
        family, site, statistic, index: what was measured; index is a head or -1.
        step: the first measured step out.
        since: the last measured step before that: it left somewhere between the two.
        until: the last measured step out, of those looked at.
        ratio: largest value over its baseline, as a factor; inf for non-finite values.
        sigmas: the same in deviations of the baseline's noise.
        common: by which factor the family's median site rose in that step: near 1 where few sites moved.
    """

    family: str
    site: str
    statistic: str
    index: int
    step: int
    since: int
    until: int
    ratio: float
    sigmas: float
    common: float

    @property
    def is_local(self) -> bool:
        """Whether it stands out from its family: it rose by more than the square of what the median site did (or of 2)."""
        return bool(self.ratio > max(self.common, 2.0) ** 2)

    @property
    def name(self) -> str:
        """The site for a reader: with its head, if it has one."""
        return self.site if self.index == SCALAR else f"{self.site}, head {self.index}"


def find_departures(run: Run, onset: int) -> list[ChangeOnset]:
    """All sites out of their baseline around ``onset``: the earliest first, then by the order of computation, then by how
    far out they went.

    Args:
        run: with telemetry of the families in ``FOLLOWED``; those that are missing are left out.
        onset: step at which the episode began.
    """
    found: list[ChangeOnset] = []
    for family, statistic in FOLLOWED:
        found += _departures(_table(run.rows(family, statistic), onset), family, statistic, onset)
    return sorted(found, key=lambda one: (one.step, ORDER[one.family], -one.sigmas))


def _table(rows: pd.DataFrame, onset: int) -> pd.DataFrame:
    """Sites and indices over steps around the onset: logarithms; inf where not finite, NaN where not measured."""
    near = rows[(rows["step"] >= onset - WINDOW) & (rows["step"] <= onset + AFTER)]
    if near.empty:
        return pd.DataFrame()
    values = near["value"].to_numpy(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(np.isfinite(values), np.log(np.abs(values)), np.inf)
    logs[logs == -np.inf] = np.nan  # a zero says nothing of how large it might have been
    keyed = pd.DataFrame(
        {"site": near["site"].astype(str), "index": near["index"], "step": near["step"], "log": logs}
    )
    order = keyed[["site", "index"]].drop_duplicates()
    table = keyed.pivot(index=["site", "index"], columns="step", values="log").sort_index(axis=1)
    return table.reindex(pd.MultiIndex.from_frame(order))


def _departures(table: pd.DataFrame, family: str, statistic: str, onset: int) -> list[ChangeOnset]:
    steps = table.columns.to_numpy(dtype=np.int64)
    before = steps < onset
    if before.sum() < LEAST_VALUES or not (steps >= onset - BEFORE).any():
        return []
    logs = table.to_numpy(np.float64)
    level, noise = _baseline(logs, steps, before)
    rise = logs - level
    with np.errstate(invalid="ignore"):
        out = rise > np.maximum(SIGMAS * noise[:, None], LEAST_RISE)
    starts = np.array([_start(row, steps, onset) for row in out])
    found = []
    for row in np.flatnonzero(starts >= 0):
        first = int(starts[row])
        looked_at = np.flatnonzero(out[row, first:]) + first
        height = float(rise[row, looked_at].max())
        site, index = table.index[int(row)]
        found.append(
            ChangeOnset(
                family=family,
                site=str(site),
                statistic=statistic,
                index=int(index),
                step=int(steps[first]),
                since=int(steps[first - 1]) if first else int(steps[first]),
                until=int(steps[looked_at[-1]]),
                ratio=float(np.exp(min(height, 700.0))) if np.isfinite(height) else float("inf"),
                sigmas=height / max(float(noise[row]), 1e-6),
                common=float(np.exp(np.clip(np.nanmedian(rise[:, first]), -700.0, 700.0))),
            )
        )
    return found


def _baseline(
    logs: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    steps: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    before: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
) -> tuple[
    np.ndarray[tuple[int, ...], np.dtype[np.float64]], np.ndarray[tuple[int, ...], np.dtype[np.float64]]
]:
    """Baseline [sites, steps], from the medians of the window's halves, and the noise around it [sites]."""
    history, at = logs[:, before], steps[before].astype(np.float64)
    history = np.where(np.isfinite(history), history, np.nan)
    half = len(at) // 2
    first, second = _median(history[:, :half]), _median(history[:, half:])
    slope = (second - first) / (np.median(at[half:]) - np.median(at[:half]))
    line = first[:, None] + slope[:, None] * (steps - np.median(at[:half]))
    noise = 1.4826 * _median(np.abs(history - line[:, before]))
    return np.maximum(line, second[:, None]), noise


def _median(
    values: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Row medians over what is there; NaN for rows with less than two values."""
    enough = np.isfinite(values).sum(axis=1) >= 2
    median = np.full(len(values), np.nan)
    median[enough] = np.nanmedian(values[enough], axis=1)
    return median


def _start(
    out: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    steps: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    onset: int,
) -> int:
    """Column at which the departure near the onset began; -1 if there is none."""
    near = np.flatnonzero(out & (steps >= onset - BEFORE))
    if not len(near):
        return -1
    first = int(near[0])
    while first > 0 and (out[first - 1] or (first > 1 and out[first - 2])):
        first -= 1 if out[first - 1] else 2
    return first

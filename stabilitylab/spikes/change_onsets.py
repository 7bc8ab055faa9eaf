"""Which site left its own baseline, and when: departures around a step.

For each site the module follows the logarithm y of a positive statistic (a norm, a maximum) over the ``WINDOW`` steps before the
onset. Its baseline is a straight line through the medians of the window's two halves, but no lower than the second one (a falling
norm that levels off has not left its baseline); its noise is 1.4826 times the median absolute deviation from the line. It is *out*
where

    y - baseline > max(5 noise, ln 2)

(5, since the module looks at some thousand sites for a dozen steps: a Gaussian exceeds it once in 3.5 million.) The medians are
blind to a departure that takes up less than half of the window's second half, so a site that left early is measured against its
level before. A *departure* is the run of values out that touches the steps from 8 before the onset (StableAdamW, 2304.13013,
section 3.4: loss spikes follow within 1 to 8 steps) to 3 after it, followed back to its beginning; a single value back inside does
not interrupt it. Non-finite values are out.

Fewer than ``USUAL_VALUES`` measurements in the window estimate the noise badly: the bound is then max(8 noise, ln 3). With fewer
than ``LEAST_VALUES`` the module says nothing.

A departure cannot be placed between two measurements of a site. Within one step departures are in order of execution, which the run
recorded (``Places.order``): the forward pass in that order, the backward pass in reverse, then the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stabilitylab.runs import Run
from stabilitylab.telemetry import SCALAR

if TYPE_CHECKING:
    import pandas as pd

WINDOW = 128
BEFORE = 8
AFTER = 3
USUAL_VALUES = 12
LEAST_VALUES = 5
SIGMAS, SIGMAS_OF_FEW = 5.0, 8.0
LEAST_RISE, LEAST_RISE_OF_FEW = float(np.log(2)), float(np.log(3))

# The statistics followed, in the order in which a step computes them: forward, backward, update.
FOLLOWED = (
    ("attention", "score_max"),
    ("activation", "absmax"),
    ("activation_gradient", "rms"),
    ("gradient", "l2"),
    ("update", "rms"),
)
_PASS = {"attention": 0, "activation": 0, "activation_gradient": 1, "gradient": 1, "update": 2}
_FAMILY = {family: place for place, (family, _) in enumerate(FOLLOWED)}


class Execution:
    """When a step comes to a site.

    Args:
        order: sites as the forward pass comes to them (``Places.order``); empty where the run did not record it: then only the
            order of the families is known.
    """

    def __init__(self, order: Sequence[str]) -> None:
        self.order = tuple(order)
        self._at = {site: i for i, site in enumerate(order)}
        # A parameter's own module may have no site (a fused projection): then take the first site in it, or in its parent.
        self._first: dict[str, int] = {}
        for i, site in enumerate(order):
            parts = site.removeprefix("attention/").removesuffix(":input").split(".")
            for end in range(1, len(parts) + 1):
                self._first.setdefault(".".join(parts[:end]), i)

    def place(self, family: str, site: str) -> tuple[int, int, int]:
        """The sort key within one step."""
        passes = _PASS.get(family, 3)
        if not self._at:
            return passes, _FAMILY.get(family, 9), 0
        forward = self._forward(family, site)
        if forward is None:  # after all that is known, in either pass
            return passes, len(self._at), _FAMILY.get(family, 9)
        return passes, -forward if passes == 1 else forward, _FAMILY.get(family, 9)

    def _forward(self, family: str, site: str) -> int | None:
        """Number of the site, or of a parameter's module, in the forward pass."""
        if family == "attention":
            return self._at.get(f"attention/{site}", self._first.get(site))
        if site in self._at:
            return self._at[site]
        module = site.rpartition(".")[0] if family in ("gradient", "update") else site
        while module:
            if (first := self._first.get(module)) is not None:
                return first
            module = module.rpartition(".")[0]
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeOnset:
    """A site out of its baseline.

    Attributes:
        family, site, statistic, index: the measured metric; index is a head or -1.
        step: the first measured step out.
        since: the last measured step before that: it left somewhere between the two.
        until: the last measured step out, of those looked at.
        order: sorts the departures of one step in order of execution: pass, then place in it.
        ratio: largest value over its baseline, as a factor; inf for non-finite values.
        jump: the same of the first value out: how far the site moved between two measurements.
        sigmas: the same in deviations of the baseline's noise.
        common: the factor by which the family's median site rose in that step: near 1 where few sites moved.
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
    jump: float = 1.0
    order: tuple[int, int, int] = (0, 0, 0)

    @property
    def is_local(self) -> bool:
        """Whether it stands out from its family: it rose by more than the square of the median site's factor (or of 2). A
        non-finite value always does: all that follows it is non-finite too, so only the order tells which came first."""
        return math.isinf(self.ratio) or math.sqrt(self.ratio) > max(self.common, 2.0)

    @property
    def name(self) -> str:
        """The site for a reader: with its head, if it has one."""
        return self.site if self.index == SCALAR else f"{self.site}, head {self.index}"


def find_departures(run: Run, onset: int) -> list[ChangeOnset]:
    """All sites out of their baseline around ``onset``: the earliest first, then in order of execution.

    Args:
        run: has telemetry of the families in ``FOLLOWED``; missing ones are left out.
        onset: step at which the episode began.
    """
    found: list[ChangeOnset] = []
    execution = Execution(run.places.order)
    for family, statistic in FOLLOWED:
        table = _table(run.near(family, statistic, onset - WINDOW, onset + AFTER), onset)
        found += _departures(table, family, statistic, onset, execution)
    return sorted(found, key=lambda one: (one.step, one.order, -one.sigmas))


def measurements_before(run: Run, onset: int) -> int:
    """How many measurements the most often measured family has in the window before the onset."""
    counts = (
        run.near(family, statistic, onset - WINDOW, onset - 1)["step"].nunique()
        for family, statistic in FOLLOWED
    )
    return max(counts, default=0)


def _table(rows: pd.DataFrame, onset: int) -> pd.DataFrame:
    """Sites and indices over steps around the onset: logarithms; inf where not finite, NaN where not measured."""
    import pandas as pd

    near = rows[(rows["step"] >= onset - WINDOW) & (rows["step"] <= onset + AFTER)]
    if near.empty:
        return pd.DataFrame()
    values = near["value"].to_numpy(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(np.isfinite(values), np.log(np.abs(values)), np.inf)
    logs[logs == -np.inf] = np.nan  # a zero says nothing about the usual size
    keyed = pd.DataFrame(
        {"site": near["site"].astype(str), "index": near["index"], "step": near["step"], "log": logs}
    )
    order = keyed[["site", "index"]].drop_duplicates()
    table = keyed.pivot(index=["site", "index"], columns="step", values="log").sort_index(axis=1)
    return table.reindex(pd.MultiIndex.from_frame(order))


def _departures(
    table: pd.DataFrame, family: str, statistic: str, onset: int, execution: Execution
) -> list[ChangeOnset]:
    steps = table.columns.to_numpy(dtype=np.int64)
    before = steps < onset
    if before.sum() < LEAST_VALUES or not (steps >= onset - BEFORE).any():
        return []
    logs = table.to_numpy(np.float64)
    level, noise = _baseline(logs, steps, before)
    rise = logs - level
    with np.errstate(invalid="ignore"):
        few = before.sum() < USUAL_VALUES
        sigmas, least = (SIGMAS_OF_FEW, LEAST_RISE_OF_FEW) if few else (SIGMAS, LEAST_RISE)
        out = rise > np.maximum(sigmas * noise[:, None], least)
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
                ratio=_factor(height),
                jump=_factor(float(rise[row, first])),
                sigmas=height / max(float(noise[row]), 1e-6),
                common=float(np.exp(np.clip(np.nanmedian(rise[:, first]), -700.0, 700.0))),
                order=execution.place(family, str(site)),
            )
        )
    return found


def _factor(rise: float) -> float:
    return math.exp(min(rise, 700.0)) if math.isfinite(rise) else math.inf


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
    """Row medians of the values present; NaN for rows with fewer than two."""
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

"""An arm's worth: numbers from several runs, each defined once.

**LR sensitivity** (Wortsman et al., arXiv:2309.14322, section 2.2): how much loss a wrong learning rate costs,

    E over the rates of [ min(loss at the rate, loss at initialisation) - best loss ]

over rates evenly spaced on the log scale, there 3e-4 to 3e-1. A run that died counts with the loss at initialisation, so an
exploding run costs no more than one that learns nothing.

**Best rate**: the rate with the lowest loss, and that loss. Every arm has the same rates, and so the same luck of choice.

**Survival**: share of runs not yet collapsed after each step, from runs that collapsed or whose watch ended (Kaplan and Meier
1958), with its 95 % interval on the log-log scale (Borgan and Liestol 1990), both SciPy's.

**Harm of a spike**: fork a run before an excursion that recovers, and withhold in the fork the updates that made it; the harm is
how much higher the run's held-out loss is, a number of steps after (``spike_harm`` in the suites).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# log2 of the rates of Wortsman et al., in steps of four: 3e-4 to .31.
WORTSMAN = tuple(math.log2(3e-4) + 2 * k for k in range(6))


def lr_sensitivity(losses: Mapping[float, float], initial: float) -> float:
    """LR sensitivity, in the unit of the losses.

    Args:
        losses: final loss by rate, evenly spaced on the log scale; infinite or NaN where the run died.
        initial: loss before the first update.
    """
    capped = [min(loss, initial) if math.isfinite(loss) else initial for loss in losses.values()]
    return float(np.mean(capped) - min(capped))


def at_best_rate(losses: Mapping[float, float]) -> tuple[float, float]:
    """The rate with the lowest loss, the lowest of equal ones, and that loss; infinite where every run died."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        return math.nan, math.inf
    best = min(sorted(finite), key=lambda rate: finite[rate])
    return best, finite[best]


@dataclass(frozen=True, kw_only=True)
class Survival:
    """A curve in steps: from ``steps[i]`` on ``share[i]`` of the runs are alive, with its interval.

    Attributes:
        steps: at which a run collapsed.
        runs, collapsed: how many were watched, and how many of these collapsed.
    """

    steps: tuple[float, ...]
    share: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    runs: int
    collapsed: int

    def at(self, step: float) -> float:
        """Share alive after ``step``."""
        place = int(np.searchsorted(self.steps, step, side="right"))
        return self.share[place - 1] if place else 1.0

    @property
    def median(self) -> float:
        """The step by which half of the runs have collapsed; infinite where they have not."""
        return next(
            (step for step, share in zip(self.steps, self.share, strict=True) if share <= 0.5), math.inf
        )


def survival(collapsed: Sequence[float], watched: Sequence[float] = ()) -> Survival:
    """The survival curve of runs that collapsed at these steps, and of runs alive when last seen at those."""
    if not len(collapsed):
        return Survival(steps=(), share=(), low=(), high=(), runs=len(watched), collapsed=0)
    curve = stats.ecdf(stats.CensoredData(uncensored=list(collapsed), right=list(watched))).sf
    steps = np.unique(np.asarray(collapsed, dtype=float))
    with warnings.catch_warnings():
        # Where all have collapsed the interval has no formula: it goes from 0 to the previous upper end.
        warnings.filterwarnings("ignore", message="The confidence interval is undefined")
        ends = curve.confidence_interval(0.95, method="log-log")
    low, high = (end.evaluate(steps) for end in (ends.low, ends.high))  # type: ignore[attr-defined]  # SciPy's stub
    undefined = np.isnan(high)
    low, high = np.where(undefined, 0.0, low), np.where(undefined, np.nanmin(high, initial=1.0), high)
    share = curve.evaluate(steps)
    return Survival(
        steps=tuple(steps.tolist()),
        share=tuple(share.tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        runs=len(collapsed) + len(watched),
        collapsed=len(collapsed),
    )

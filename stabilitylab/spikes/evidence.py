"""The evidence around an episode: everything that the rules of ``suspects.py`` need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stabilitylab.runs import Run
from stabilitylab.spikes.change_onsets import AFTER, ChangeOnset, Execution
from stabilitylab.spikes.episodes import Episode
from stabilitylab.spikes.reasons import RATE_FACTOR
from stabilitylab.telemetry import LEARNING_RATE, Event

LEAD_STEPS = 64
# The run bears a rate that has grown by less than this over ``LEAD_STEPS``.
_CLIMBED = 2.0
_BEFORE = 8
_MEASURED = (("activation", "absmax"), ("gradient", "l2"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Climb:
    """A rate that rose gradually, from ``low`` at step ``since`` to ``high`` at ``step``, the highest of the run so far."""

    since: int
    low: float
    step: int
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The evidence around an episode.

    Attributes:
        departures: in order (``find_departures``).
        rate_change: step and factor.
        outside: events ``parameter-changed``, ``moments-changed``, ``optimizer-changed`` near the onset, in order.
        overflow: the first event ``overflow`` near the onset.
        gradients: number of parameters whose gradients the run followed.
        nearest: the parameters whose gradients the backward pass computes first.
        heads: attention module whose scores the run followed -> its number of heads.
        execution: when a step comes to a site.
        climb: how the rate rose gradually to the run's highest so far.
        is_sudden: whether half of the signal's rise came in its first step, in which the run measured layers and gradients.
    """

    departures: Sequence[ChangeOnset]
    rate_change: tuple[int, float] | None
    outside: Sequence[Event]
    overflow: Event | None
    gradients: int
    execution: Execution
    nearest: frozenset[str] = frozenset()
    heads: Mapping[str, int] = field(default_factory=dict)
    climb: Climb | None = None
    is_sudden: bool = False


def gather(run: Run, episode: Episode, departures: Sequence[ChangeOnset]) -> Evidence:
    """Collect everything that the rules need."""
    onset = episode.onset
    near = [event for event in run.events if onset - LEAD_STEPS <= event.step <= onset + AFTER]
    shares = run.near("gradient", "l2", onset - LEAD_STEPS, onset + AFTER)
    scores = run.near("attention", "score_max", onset - LEAD_STEPS, onset + AFTER)
    execution = Execution(run.places.order)
    first = min((one.step for one in departures if one.family != "update"), default=onset)
    places = {str(site): execution.place("gradient", str(site)) for site in shares["site"].unique()}
    return Evidence(
        departures=departures,
        rate_change=_rate_change(run, onset),
        outside=[e for e in near if e.kind in ("parameter-changed", "moments-changed", "optimizer-changed")],
        overflow=next(
            (event for event in near if event.kind == "overflow" and _counts(event, episode)), None
        ),
        gradients=int(shares["site"].nunique()) if len(shares) else 0,
        execution=execution,
        nearest=frozenset(site for site, place in places.items() if place == min(places.values())),
        heads={
            str(site): int(count)
            for site, count in scores.groupby("site", observed=True)["index"].nunique().items()
        },
        climb=_climb(run, min(first, onset)),
        is_sudden=_is_sudden(run, episode),
    )


def _counts(event: Event, episode: Episode) -> bool:
    """Whether an overflow counts: a growing loss scale overflows gradients as a matter of routine; an activation's overflow counts,
    or any in an episode that is about numbers."""
    if episode.kind in ("loss-scale-collapse", "non-finite"):
        return True
    return event.data.get("tensor") == "activation"


def _rate_change(run: Run, onset: int) -> tuple[int, float] | None:
    """The latest jump of the learning rate within 64 steps before the onset, as (step, factor).

    A warm-up from zero multiplies its first rates by 2, 3/2, ...: a jump counts only if it is more than half as large again as the
    one before it.
    """
    rate = run.series(LEARNING_RATE)
    rate = rate[(rate.index <= onset) & (rate.index >= onset - LEAD_STEPS - 2) & (rate > 0)]
    factors = (rate / rate.shift(1)).to_numpy(np.float64)
    for i in range(len(factors) - 1, 1, -1):
        usual = max(1.0, factors[i - 1])
        if factors[i] >= RATE_FACTOR * usual:
            return int(rate.index[i]), float(factors[i])
    return None


def _climb(run: Run, first: int) -> Climb | None:
    """How the rate rose within 64 steps up to ``first``, if at least twofold and past any rate that the run had borne before."""
    rate = run.series(LEARNING_RATE)
    rate = rate[(rate.index <= first) & (rate > 0)]
    near = rate[rate.index >= first - LEAD_STEPS]
    if len(near) < _BEFORE:
        return None
    steps, values = near.index.to_numpy(), near.to_numpy(np.float64)
    top = int(values.argmax())
    low = int(values[: top + 1].argmin())
    if values[top] < max(_CLIMBED * values[low], float(rate.max())):
        return None
    return Climb(since=int(steps[low]), low=float(values[low]), step=int(steps[top]), high=float(values[top]))


def _is_sudden(run: Run, episode: Episode) -> bool:
    """Whether half of the signal's rise came in its first step. A drifting state moves it gradually."""
    if episode.height is None or episode.signal.count("/") < 2:  # a site, and no signal
        return False
    signal = run.series(episode.signal)
    before = signal[(signal.index < episode.onset) & (signal.index >= episode.onset - _BEFORE)]
    at = signal[signal.index == episode.onset]
    if len(before) < 4 or at.empty:
        return False
    if any(run.near(*one, episode.onset, episode.onset).empty for one in _MEASURED):
        return False
    return bool(float(at.iloc[0]) - float(before.median()) >= episode.height / 2)

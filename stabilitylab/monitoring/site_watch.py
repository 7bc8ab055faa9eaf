"""Reports sites that move far from their own baseline, as it happens: the event ``site-departure``.

A head's scores, or one parameter's gradient, may grow thirtyfold without moving the loss: softmax bounds the one, Adam and clipping
the other. For every site the logarithm y of a positive statistic (``FOLLOWED``, without the update, which follows the rate) has a
running level and a running mean deviation d (``spikes/site_levels.py``). A site has left where y - level > max(SIGMAS d, ln
FACTOR), and still does after subtracting the rise that three sites in four of its family share: a hard batch moves them all. A rise
of ``ANY`` counts even if all sites share it, since no batch causes that. The event names the first site in order of execution and
how many left with it; for ``QUIET`` steps no other follows. The event itself never acts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stabilitylab.probes.base import Readings
from stabilitylab.spikes.change_onsets import FOLLOWED, Execution
from stabilitylab.spikes.site_levels import SiteLevels
from stabilitylab.spikes.snapshots import Snapshots
from stabilitylab.telemetry import Event, Key

SIGMAS = 10.0
FACTOR = 6.0
ANY = 64.0
QUIET = 32
KEEP_EVERY = 16
_STATISTIC = {family: statistic for family, statistic in FOLLOWED if family != "update"}


class _Followed:
    """Levels of the followed ones among some keys."""

    def __init__(self, keys: tuple[Key, ...]) -> None:
        self.keys = keys
        own = [i for i, key in enumerate(keys) if _STATISTIC.get(key.family) == key.statistic]
        self.at = np.array(own, dtype=np.int64)
        self.levels = SiteLevels(len(own))
        self.kept = Snapshots()
        self.since_kept = 0

    def keep(self, step: int) -> None:
        """Remember the levels now and then, for a run that goes back to after ``step``."""
        self.since_kept += 1
        if self.since_kept >= KEEP_EVERY:
            self.since_kept = 0
            levels = self.levels
            self.kept.add(step, (levels.level.copy(), levels.deviation.copy(), levels.seen.copy()))

    def go_back(self, step: int) -> None:
        """Restore the levels as they were before ``step``; start afresh where none are known."""
        state = self.kept.before(step)
        self.levels, self.since_kept = SiteLevels(len(self.at)), 0
        if state is not None:
            self.levels.level, self.levels.deviation, self.levels.seen = (one.copy() for one in state)


class SiteWatch:
    """Follows all sites of a run.

    Args:
        order: sites in the order of execution, as far as known (``Context.order``; it may still grow).
    """

    def __init__(self, order: Mapping[str, object]) -> None:
        self._order, self._execution = order, Execution([])
        self._followed: dict[int, _Followed] = {}
        self._told: int | None = None
        self._step: int | None = None

    def events(self, step: int, readings: Sequence[Readings]) -> list[Event]:
        """The departure that this step shows, if there is one. Steps come in order; one that goes back continues from the levels of
        that time, as levels of discarded weights say nothing."""
        if self._step is not None and step < self._step:
            self._told = self._told if self._told is not None and self._told < step else None
            for followed in self._followed.values():
                followed.go_back(step)
        self._step = step
        found: list[tuple[Key, float, float]] = []
        for one in readings:
            if not any(key.family in _STATISTIC for key in one.keys[:1]):
                continue
            found += self._left(one)
            if (held := self._followed.get(id(one.keys))) is not None:
                held.keep(step)
        if not found or (self._told is not None and step - self._told < QUIET):
            return []
        self._told = step
        key, rise, deviation = min(found, key=lambda left: self._place(left[0]))
        data = {
            "signal": key.metric,
            "family": key.family,
            "site": key.site,
            "statistic": key.statistic,
            "index": key.index,
            "factor": float(np.exp(min(rise, 700.0))),
            "deviations": float(rise / max(deviation, 1e-6)),
            "count": len(found),
        }
        return [Event(step=step, kind="site-departure", data=data)]

    def _left(self, one: Readings) -> list[tuple[Key, float, float]]:
        """The sites that left, with their rise and their own deviation."""
        followed = self._followed.get(id(one.keys))
        if followed is None or followed.keys is not one.keys:
            followed = self._followed[id(one.keys)] = self._inherited(_Followed(one.keys))
        if not len(followed.at):
            return []
        deviation = followed.levels.deviation.copy()
        rise = followed.levels.rise(one.values[followed.at])
        heard = rise[rise > -np.inf]
        common = max(float(np.quantile(heard, 0.25, method="lower")), 0.0) if len(heard) else 0.0
        common = min(common, float(np.log(ANY / FACTOR)))
        left = rise - common > np.maximum(SIGMAS * deviation, np.log(FACTOR))
        return [(one.keys[followed.at[i]], float(rise[i]), float(deviation[i])) for i in np.flatnonzero(left)]

    def _inherited(self, fresh: _Followed) -> _Followed:
        """Give another set of sites (without an expert not reached, with one more micro-batch) the known levels of each."""
        families = {fresh.keys[i].family for i in fresh.at}
        for number, old in list(self._followed.items()):
            if {old.keys[i].family for i in old.at} & families:
                known = {old.keys[i]: j for j, i in enumerate(old.at)}
                pairs = [(j, known[k]) for j, i in enumerate(fresh.at) if (k := fresh.keys[i]) in known]
                if pairs:
                    new, of = (np.array(side) for side in zip(*pairs, strict=True))
                    for name in ("level", "deviation", "seen"):
                        getattr(fresh.levels, name)[new] = getattr(old.levels, name)[of]
                del self._followed[number]
        return fresh

    def _place(self, key: Key) -> tuple[int, int, int]:
        """A sort key: forward sites in order, then backward ones in reverse."""
        if len(self._execution.order) != len(self._order):  # the order is still growing
            self._execution = Execution(list(self._order))
        return self._execution.place(key.family, key.site)

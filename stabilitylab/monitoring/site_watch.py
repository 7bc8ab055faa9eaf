"""Sites that leave their own baseline by far, as they do it: the event ``site-departure``.

A head's scores that grow thirtyfold, or one parameter's gradient, may leave the loss where it is: softmax bounds the one, Adam and
clipping the other. Of every site the logarithm y of a positive statistic (``FOLLOWED``, the update left out: it follows the rate)
has a running level and a running mean deviation d,

    level += g (y - level)        d += g (|y - level| - d)        g = 1/8, deviations clipped at 4 d

and a site has left where, after ``LEAST`` measurements, y - level > max(SIGMAS d, ln FACTOR), and where that much remains when the
rise of the family's median site is taken off (a hard batch moves them all). Told is the first site in the order of execution, with
how many left with it, and for ``QUIET`` steps no further one. The event never acts; a reader, and forensics, may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stabilitylab.probes.base import Readings
from stabilitylab.spikes.change_onsets import FOLLOWED
from stabilitylab.telemetry import Event, Key

GAIN = 1 / 8
LEAST = 16
SIGMAS = 10.0
FACTOR = 6.0
QUIET = 32
_CLIP = 4.0
_STATISTIC = {family: statistic for family, statistic in FOLLOWED if family != "update"}
_FAMILIES = tuple(_STATISTIC)

Array = NDArray[np.float64]


class _Levels:
    """Running levels of one tuple of keys: those of them that are followed."""

    def __init__(self, keys: tuple[Key, ...]) -> None:
        self.keys = keys
        self.at = np.array(
            [i for i, k in enumerate(keys) if _STATISTIC.get(k.family) == k.statistic], dtype=np.int64
        )
        self.level, self.deviation = np.zeros(len(self.at)), np.zeros(len(self.at))
        self.count = np.zeros(len(self.at), dtype=np.int64)

    def rise(self, values: Array) -> tuple[Array, Array]:
        """y - level, and what it must pass; then both are taken in. NaN and no threshold passed where nothing was learned."""
        with np.errstate(divide="ignore", invalid="ignore"):
            y = np.log(np.abs(values[self.at]))
        seen = np.isfinite(y)
        rise = np.where(seen & (self.count >= LEAST), y - self.level, -np.inf)
        limit = np.maximum(SIGMAS * self.deviation, np.log(FACTOR))
        # The first values make the level, later ones move it.
        gain = np.maximum(GAIN, 1.0 / (self.count + 1.0))
        apart = np.where(seen, y - self.level, 0.0)
        known = self.count >= LEAST
        bound = np.where(known, _CLIP * np.maximum(self.deviation, 0.02), np.inf)
        apart = np.clip(apart, -bound, bound)
        self.level += gain * apart
        self.deviation += np.where(seen & (self.count > 0), gain * (np.abs(apart) - self.deviation), 0.0)
        self.count += seen
        return rise, limit


class SiteWatch:
    """Follows all sites of a run.

    Args:
        order: sites in the order of execution, as far as it is known (``Context.order``; it may still grow).
    """

    def __init__(self, order: Mapping[str, object]) -> None:
        self._order = order
        self._levels: dict[int, _Levels] = {}
        self._told: int | None = None

    def events(self, step: int, readings: Sequence[Readings]) -> list[Event]:
        """The departure that this step shows, if there is one. Steps come in order; one that goes back begins anew."""
        if self._told is not None and step < self._told:
            self._told = None
        found: list[tuple[Key, float, float]] = []
        for one in readings:
            if not any(key.family in _STATISTIC for key in one.keys[:1]):
                continue
            found += self._left(one)
        if not found or (self._told is not None and step - self._told < QUIET):
            return []
        self._told = step
        key, rise, limit = min(found, key=lambda left: self._place(left[0]))
        data = {
            "signal": key.metric,
            "family": key.family,
            "site": key.site,
            "statistic": key.statistic,
            "index": key.index,
            "factor": float(np.exp(min(rise, 700.0))),
            "times_its_noise": float(rise / limit * SIGMAS),
            "count": len(found),
        }
        return [Event(step=step, kind="site-departure", data=data)]

    def _left(self, one: Readings) -> list[tuple[Key, float, float]]:
        levels = self._levels.get(id(one.keys))
        if levels is None or levels.keys is not one.keys:
            levels = self._levels[id(one.keys)] = self._inherited(_Levels(one.keys))
        if not len(levels.at):
            return []
        rise, limit = levels.rise(one.values)
        heard = rise[rise > -np.inf]
        common = max(float(np.median(heard)), 0.0) if len(heard) else 0.0
        return [
            (one.keys[levels.at[i]], float(rise[i]), float(limit[i]))
            for i in np.flatnonzero(rise - common > limit)
        ]

    def _inherited(self, fresh: _Levels) -> _Levels:
        """Another set of sites (an expert that was not reached, a micro-batch more) goes on with what is known of each."""
        families = {fresh.keys[i].family for i in fresh.at}
        for number, old in list(self._levels.items()):
            if {old.keys[i].family for i in old.at} & families:
                known = {old.keys[i]: j for j, i in enumerate(old.at)}
                pairs = [(j, known[k]) for j, i in enumerate(fresh.at) if (k := fresh.keys[i]) in known]
                if pairs:
                    new, of = (np.array(side) for side in zip(*pairs, strict=True))
                    for name in ("level", "deviation", "count"):
                        getattr(fresh, name)[new] = getattr(old, name)[of]
                del self._levels[number]
        return fresh

    def _place(self, key: Key) -> tuple[int, int]:
        """Forward sites in order, then the backward ones in the reverse."""
        order = {site: i for i, site in enumerate(self._order)}
        if key.family in ("attention", "activation"):
            name = f"attention/{key.site}" if key.family == "attention" else key.site
            return 0, order.get(name, len(order))
        module = key.site.rpartition(".")[0] if key.family == "gradient" else key.site
        return 1, -order.get(module, order.get(f"{module}:input", -1))

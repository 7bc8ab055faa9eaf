"""From packets to arrays: what one probe saw, of one rank or of several put together.

Data-parallel ranks see the same sites with other samples, tensor-parallel ones the same sites with other
channels, and pipeline ranks other sites. All three are joined by name: a site seen by several ranks is
combined number by number as its region says (sums add, maxima win, what all hold alike is the first one's),
exactly as micro-batches are; a site seen by one rank is that rank's.

Channels of tensor-parallel shards have the same numbers on each rank and are combined like those of
data-parallel ranks: channel statistics of a sharded tensor are those of the channels laid on top of each
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabilitylab.statistics.buffer import MAXIMA
from stabilitylab.statistics.summary import FIELDS, SUMS
from stabilitylab.statistics.transfer import Place, Seen

Numbers = tuple[NDArray[Any] | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """``Seen`` with the numbers in the places."""

    sites: tuple[str, ...]
    numbers: list[Numbers]
    scale: float
    extra: Any

    def rows(self, position: int = 0) -> NDArray[np.float64]:
        """The numbers at one position of every site, [sites, n]."""
        return np.array([numbers[position] for numbers in self.numbers], dtype=np.float64)


def gather(seen: Sequence[tuple[Seen, NDArray[np.uint8]]]) -> Gathered:
    """What several ranks saw, each with its packet, put together; of one rank, its own."""
    first, packet = seen[0]
    scale = float(first.scale.read(packet)[0]) if isinstance(first.scale, Place) else first.scale
    found: dict[str, Numbers] = {}
    places: dict[str, tuple[Place | None, ...]] = {}
    for one, its_packet in seen:
        for site, where in zip(one.sites, one.places, strict=True):
            numbers = tuple(place.read(its_packet) if place is not None else None for place in where)
            if site in found:
                together = zip(places[site], found[site], numbers, strict=True)
                numbers = tuple(_combined(place, a, b) for place, a, b in together)
            else:
                places[site] = where
            found[site] = numbers
    return Gathered(sites=tuple(found), numbers=list(found.values()), scale=scale, extra=first.extra)


def _combined(place: Place | None, a: NDArray[Any] | None, b: NDArray[Any] | None) -> NDArray[Any] | None:
    if place is None or a is None or b is None or len(a) != len(b):
        return None if place is None or place.region != "replicated" else a
    if place.region == "replicated":
        return a
    if place.region == "rows":
        sums = np.arange(len(a)) % len(FIELDS) < len(SUMS)
        return np.asarray(np.where(sums, a + b, np.maximum(a, b)))
    return np.asarray(np.maximum(a, b) if place.region in MAXIMA else a + b)

"""From packets to arrays: one probe's numbers, of one rank or of several joined.

Data-parallel ranks see the same sites with other samples, tensor-parallel ones the same sites with other channels or heads, and
pipeline ranks other sites. The module joins all three by name. It combines a site that several ranks saw number by number as its
region says, exactly like micro-batches: sums add, maxima win, and the first counts of what all hold alike. Different *shards* (each
tensor rank holds a part of a gradient, already reduced over the data ranks) add up; of copies of a shard the first counts.

It lays heads and channels of a *split* site (``Seen.split``) side by side, in the order of the shards; those of any other combine,
head with head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabilitylab.statistics.buffer import MAXIMA
from stabilitylab.statistics.summary import FIELDS, SUMS
from stabilitylab.statistics.transfer import PacketSlice, Seen

Numbers = tuple[NDArray[Any] | None, ...]
Packet = NDArray[np.uint8]
# Regions of which a split site has one number per head or channel.
_SIDE_BY_SIDE = frozenset({"lists", "head_sums", "maxima", "bits", "squares"})
_FIRST = frozenset({"replicated", "shards", "shard_sums", "lists"})
_ADDS = np.arange(len(FIELDS)) < len(SUMS)


class Gathered:
    """A probe's numbers of all ranks, read and joined on demand.

    Args:
        seen: each rank's ``Seen``, with its packet.
    """

    def __init__(self, seen: Sequence[tuple[Seen, Packet]]) -> None:
        self._seen = seen
        first, packet = seen[0]
        self.extra = first.extra
        self.scale = (
            float(first.scale.read(packet)[0]) if isinstance(first.scale, PacketSlice) else first.scale
        )

    @cached_property
    def _joined(self) -> dict[str, tuple[int, Numbers]]:
        return _join(self._seen)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites' names."""
        return self._seen[0][0].sites if len(self._seen) == 1 else tuple(self._joined)

    @property
    def numbers(self) -> list[Numbers]:
        """The numbers of each site."""
        return [numbers for _, numbers in self._joined.values()]

    def shards(self, i: int) -> int:
        """The number of parts of the i-th site that lie side by side: 1 if it is not split."""
        return list(self._joined.values())[i][0]

    def rows(self, position: int = 0) -> NDArray[Any]:
        """The numbers at one position of every site, [sites, n], where all have equally many."""
        if len(self._seen) == 1:
            seen, packet = self._seen[0]
            index, dtype = seen.index(position)
            return np.asarray(packet.view(dtype)[index])
        return np.array([numbers[position] for numbers in self.numbers])


def _join(seen: Sequence[tuple[Seen, Packet]]) -> dict[str, tuple[int, Numbers]]:
    """Site -> (parts side by side, numbers), in order of appearance: joins first ranks with the same shard, then the shards."""
    parts: dict[str, dict[int, Numbers]] = {}
    of: dict[str, tuple[tuple[PacketSlice | None, ...], bool]] = {}
    for one, packet in seen:
        for site, places, split in zip(one.sites, one.places, one.split, strict=True):
            of.setdefault(site, (places, split))
            numbers = tuple(place.read(packet) if place is not None else None for place in places)
            shards = parts.setdefault(site, {})
            before = shards.get(one.shard)
            shards[one.shard] = numbers if before is None else _over(_combined, places, before, numbers)
    joined: dict[str, tuple[int, Numbers]] = {}
    for site, shards in parts.items():
        places, split = of[site]
        first, *others = (shards[shard] for shard in sorted(shards))
        for other in others:
            first = _over(_side_by_side if split else _shards, places, first, other)
        joined[site] = (len(shards) if split else 1), first
    return joined


def _over(how: Any, places: tuple[PacketSlice | None, ...], a: Numbers, b: Numbers) -> Numbers:
    return tuple(
        None if place is None or x is None or y is None else how(place.region, x, y)
        for place, x, y in zip(places, a, b, strict=True)
    )


def _combined(region: str, a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any] | None:
    """Combine two of the same kind: other samples, or the same thing twice."""
    if region in _FIRST:
        return a
    if len(a) != len(b):
        return None
    if region == "rows":
        return np.asarray(np.where(_ADDS, a + b, np.maximum(a, b)))
    return np.asarray(np.maximum(a, b) if region in MAXIMA else a + b)


def _shards(region: str, a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any] | None:
    """Combine two parts of one thing."""
    return _combined({"shards": "rows", "shard_sums": "sums"}.get(region, region), a, b)


def _side_by_side(region: str, a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any] | None:
    """Join two with different heads or channels."""
    return np.concatenate([a, b]) if region in _SIDE_BY_SIDE else _shards(region, a, b)

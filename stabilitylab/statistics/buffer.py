"""The preallocated buffer of each device: holds every probe's numbers of one step, which leave it in one transfer.

A buffer has *regions*, which differ in number type and in how parts of one number (micro-batches, ranks) combine:

    region      numbers  parts of one number
    rows        float64  tensor summaries of FIELDS numbers each: sums add, the rest are maxima
    replicated  float64  any, of tensors that every rank holds alike: not combined over ranks
    shards      float64  as rows, of tensors of which some ranks hold parts and some the same part
    shard_sums  float64  the same, of numbers that all add
    lists       float64  of shards: side by side; of copies of a shard, the first
    sums        float64  add
    head_sums   float64  add (per head)
    maxima      float64  larger wins (per head)
    squares     float32  add (per channel)
    bits        int32    larger wins (per channel: a magnitude's bits, which order as the magnitude does)
    tail        int32    add (histogram counts)

A probe reserves ``Slots`` in a region once. Within a step the first write overwrites and later ones combine, so nothing needs
clearing between steps; ``stamp`` tells which slots belong to this step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.statistics.transfer import REGIONS, PacketSlice

MAXIMA = frozenset({"maxima", "bits"})


@dataclass(slots=True, eq=False)
class Slots:
    """A range of one region on one device. ``stamp`` is that of the step that last wrote it."""

    region: str
    offset: int
    length: int
    device: torch.device
    stamp: int = -1


class _Arena:
    """One device's bytes, region after region."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.capacity = dict.fromkeys(REGIONS, 0)
        self.used = dict.fromkeys(REGIONS, 0)
        self.storage = torch.empty(0, dtype=torch.uint8, device=device)
        self.regions: dict[str, Tensor] = {}
        self.layout: dict[str, tuple[int, int]] = {}

    def reserve(self, region: str, length: int) -> int:
        offset = self.used[region]
        self.used[region] += length
        if self.used[region] > self.capacity[region]:
            # A third of room to grow: only in the first forward pass sites appear one after the other.
            self.capacity[region] = self.used[region] + max(256, self.used[region] // 3) // 8 * 8
            self._lay_out()
        return offset

    def _lay_out(self) -> None:
        layout, start = {}, 0
        for region, dtype in REGIONS.items():
            size = self.capacity[region] * dtype.itemsize
            layout[region] = (start, size)
            start += (size + 7) // 8 * 8
        storage = torch.zeros(start, dtype=torch.uint8, device=self.device)
        regions = {r: storage[s : s + n].view(REGIONS[r]) for r, (s, n) in layout.items()}
        for region, old in self.regions.items():
            regions[region][: len(old)] = old
        self.storage, self.layout, self.regions = storage, layout, regions

    def trim(self) -> None:
        """Give back the room to grow."""
        self.capacity = dict(self.used)
        self.regions = {region: old[: self.used[region]] for region, old in self.regions.items()}
        self._lay_out()


class Buffer:
    """One arena per device."""

    def __init__(self) -> None:
        self._arenas: dict[torch.device, _Arena] = {}
        self._trimmed = 0
        self.stamp = 0
        # Counts up whenever the arenas move in memory, which makes addresses kept elsewhere stale.
        self.generation = 0

    def reserve(self, region: str, length: int, device: torch.device) -> Slots:
        """New slots in a region."""
        arena = self._arenas.get(device)
        if arena is None:
            arena = self._arenas[device] = _Arena(device)
        before = arena.storage
        slots = Slots(region, arena.reserve(region, length), length, device)
        self.generation += arena.storage is not before
        return slots

    def view(self, slots: Slots) -> Tensor:
        """The slots as a tensor to write into; do not keep it."""
        return self._arenas[slots.device].regions[slots.region].narrow(0, slots.offset, slots.length)

    def address(self, slots: Slots) -> int:
        """The slots' address in memory, valid while ``generation`` stays the same."""
        start, _ = self._arenas[slots.device].layout[slots.region]
        base: int = self._arenas[slots.device].storage.data_ptr()
        return base + start + slots.offset * REGIONS[slots.region].itemsize

    def put(self, slots: Slots, values: Tensor) -> None:
        """Write ``values``; combine them with what this step already wrote there."""
        view = self.view(slots)
        if slots.stamp != self.stamp:
            view.copy_(values)
            slots.stamp = self.stamp
        elif slots.region in MAXIMA:
            torch.maximum(view, values.to(view.dtype), out=view)
        else:
            view += values

    def compact(self) -> None:
        """Give back the room to grow, once the sites are known."""
        if self._trimmed != self.generation:
            for arena in self._arenas.values():
                arena.trim()
            self.generation += 1
            self._trimmed = self.generation

    def parts(self) -> list[Tensor]:
        """The bytes of each device, in their order in a packet."""
        return [arena.storage for arena in self._arenas.values()]

    def place(self, slots: Slots) -> PacketSlice:
        """The slots' place in the packet."""
        before = 0
        for device, arena in self._arenas.items():
            if device == slots.device:
                start, _ = arena.layout[slots.region]
                offset = slots.offset * REGIONS[slots.region].itemsize
                return PacketSlice(slots.region, before + start + offset, slots.length)
            before += arena.storage.numel()
        raise KeyError(slots.device)

    @property
    def nbytes(self) -> int:
        """Memory held on all devices."""
        return sum(arena.storage.numel() for arena in self._arenas.values())

    def advance(self) -> None:
        """Begin the next step: everything counts as unwritten."""
        self.stamp += 1

"""Moves a step's numbers from the device to the host as one *packet* of bytes, for which nobody waits.

On an accelerator the copy to pinned memory queues behind earlier work, and an event tells when it has arrived; the training thread
keeps queueing meanwhile. On a CPU the transfer copies the numbers at once, as the next step overwrites them.

``Seen`` says which part of a packet belongs to which site. It is plain data, so that one rank can read another's packet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

REGIONS: dict[str, torch.dtype] = {
    "rows": torch.float64,
    "replicated": torch.float64,
    "shards": torch.float64,
    "shard_sums": torch.float64,
    "lists": torch.float64,
    "sums": torch.float64,
    "head_sums": torch.float64,
    "maxima": torch.float64,
    "squares": torch.float32,
    "bits": torch.int32,
    "tail": torch.int32,
}
_NUMPY: dict[torch.dtype, Any] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.int32: np.int32,
}


@dataclass(frozen=True, slots=True)
class PacketSlice:
    """The place of some numbers of one region in a packet: first byte, and number of them."""

    region: str
    start: int
    length: int

    def read(self, packet: NDArray[np.uint8]) -> NDArray[Any]:
        """The numbers."""
        dtype = REGIONS[self.region]
        end = self.start + self.length * dtype.itemsize
        return packet[self.start : end].view(_NUMPY[dtype])


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A probe's findings in a step: for each site, the places of its numbers.

    Args:
        sites: the sites' names.
        places: the same number of places for each site; None for a number that it lacks.
        split: for each site, whether this rank has only some of its heads or channels.
        shard: which part of sharded or split sites this rank has.
        scale: a factor on the numbers, as a number or a place.
        extra: plain data that the probe needs besides to finish; of several ranks the first one's counts.
    """

    sites: tuple[str, ...]
    places: tuple[tuple[PacketSlice | None, ...], ...]
    split: tuple[bool, ...]
    shard: int = 0
    scale: float | PacketSlice = 1.0
    extra: Any = None

    def index(self, position: int) -> tuple[NDArray[np.intp], Any]:
        """Indices [sites, n] of every site's place at ``position`` in the packet, viewed as the number type returned beside them;
        all sites must have one of the same length."""
        known: dict[int, tuple[NDArray[np.intp], Any]] = self.__dict__.setdefault("_index", {})
        if position not in known:
            places = [place for places in self.places if (place := places[position]) is not None]
            dtype = REGIONS[places[0].region]
            starts = np.array([place.start for place in places]) // dtype.itemsize
            known[position] = starts[:, None] + np.arange(places[0].length), _NUMPY[dtype]
        return known[position]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Transfer:
    """One step's copy to the host, which may still be under way.

    Args:
        parts: byte tensors that make up the packet, one after the other.
        others: further tensors, small, of any device.
    """

    def __init__(self, parts: Sequence[Tensor], others: Sequence[Tensor] = ()) -> None:
        self._events: list[torch.cuda.Event] = []
        self._parts = [self._copy(part) for part in parts]
        self._others = [self._copy(other) for other in others]
        for device in {x.device for x in (*parts, *others)}:
            if device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(device))
                self._events.append(event)

    def _copy(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return x.detach().to("cpu", copy=True)
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return host.copy_(x.detach(), non_blocking=True)

    def ready(self) -> bool:
        """Whether everything has arrived."""
        return all(event.query() for event in self._events)  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Return when everything has arrived."""
        for event in self._events:
            event.synchronize()

    def packet(self) -> NDArray[np.uint8]:
        """The packet; only once it is ``ready``."""
        parts = [part.numpy() for part in self._parts]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.uint8)])

    def others(self) -> list[Tensor]:
        """The further tensors; only once they are ``ready``."""
        return self._others

"""From the device to the host: a step's numbers cross in one copy a device, and nobody waits for it.

On an accelerator the copy goes to pinned memory behind the work already queued, and an event tells when it
has arrived: the training thread goes on queueing meanwhile. On a CPU the numbers are copied at once, for the
next step will overwrite them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

REGIONS: dict[str, torch.dtype] = {
    "rows": torch.float64,
    "replicated": torch.float64,
    "sums": torch.float64,
    "maxima": torch.float64,
    "squares": torch.float32,
    "bits": torch.int32,
    "tail": torch.int32,
}
_NUMPY = {torch.float64: np.float64, torch.float32: np.float32, torch.int32: np.int32}

# Where each region lies in an arena: first byte and number of bytes.
Layout = dict[str, tuple[int, int]]


@dataclass(slots=True, eq=False)
class Slots:
    """A range of one region on one device. ``stamp`` is that of the step in which it was last written."""

    region: str
    offset: int
    length: int
    device: torch.device
    stamp: int = -1


class Host:
    """A step's numbers on the host.

    Args:
        arenas: bytes and layout of each device's arena.
    """

    def __init__(self, arenas: Mapping[torch.device, tuple[NDArray[np.uint8], Layout]]) -> None:
        self._regions: dict[tuple[torch.device, str], NDArray[Any]] = {
            (device, region): arena[start : start + size].view(_NUMPY[REGIONS[region]])
            for device, (arena, layout) in arenas.items()
            for region, (start, size) in layout.items()
        }

    def __getitem__(self, slots: Slots) -> NDArray[Any]:
        return self._regions[slots.device, slots.region][slots.offset : slots.offset + slots.length]


class Transfer:
    """One step's copy to the host, perhaps still under way.

    Args:
        arenas: storage and layout of each device's arena.
        others: further tensors, small, of any device.
    """

    def __init__(
        self, arenas: Mapping[torch.device, tuple[Tensor, Layout]], others: Sequence[Tensor] = ()
    ) -> None:
        self._events: list[torch.cuda.Event] = []
        self._layouts = {device: layout for device, (_, layout) in arenas.items()}
        self._storages = {device: self._copy(storage) for device, (storage, _) in arenas.items()}
        self._others = [self._copy(other) for other in others]
        for device in {s.device for s, _ in arenas.values()} | {other.device for other in others}:
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

    def host(self) -> Host:
        """The numbers; only once they are ``ready``."""
        return Host({d: (s.numpy(), self._layouts[d]) for d, s in self._storages.items()})

    def others(self) -> list[Tensor]:
        """The further tensors; only once they are ``ready``."""
        return self._others

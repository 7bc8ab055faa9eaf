"""The preallocated buffer of one device: every probe's numbers of one step, leaving it in one transfer.

A probe reserves a ``Block`` of float64 slots once and writes to it during the step; a second write in the
same step (the next micro-batch) merges with the first: sums add, maxima take the larger. A block nobody wrote
to in a step holds the numbers of an older one and is told apart by its stamp, so nothing need be cleared
between steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(slots=True)
class Block:
    """A range of slots: the first ``sums`` of them add up, the rest are maxima."""

    offset: int
    width: int
    sums: int
    device: torch.device
    stamp: int = -1


class Buffer:
    """Blocks of float64 on each device that the model lives on."""

    def __init__(self, slots: int = 4096) -> None:
        self._slots = slots
        self._data: dict[torch.device, Tensor] = {}
        self._used: dict[torch.device, int] = {}
        self._host: dict[torch.device, NDArray[np.float64]] = {}
        self.stamp = 0

    def reserve(self, width: int, sums: int, device: torch.device) -> Block:
        """A new block of ``width`` slots, ``sums`` of which add up and the others are maxima."""
        used = self._used.get(device, 0)
        data = self._data.get(device)
        if data is None or used + width > len(data):
            larger = torch.empty(max(self._slots, 2 * (used + width)), dtype=torch.float64, device=device)
            if data is not None:
                larger[:used] = data[:used]
            self._data[device] = larger
        self._used[device] = used + width
        return Block(used, width, sums, device)

    def view(self, block: Block) -> Tensor:
        """The block's slots, to write into."""
        return self._data[block.device].narrow(0, block.offset, block.width)

    def put(self, block: Block, values: Tensor) -> None:
        """Write ``values`` [width] float64; merge with what this step already wrote."""
        view = self.view(block)
        if block.stamp != self.stamp:
            view.copy_(values)
            block.stamp = self.stamp
        else:
            n = block.sums
            view[:n] += values[:n]
            torch.maximum(view[n:], values[n:], out=view[n:])

    def seen(self, block: Block) -> bool:
        """Whether the block was written to since the last ``advance``."""
        return block.stamp == self.stamp

    def fetch(self) -> None:
        """Bring this step's numbers to the host: one transfer a device."""
        self._host = {device: data[: self._used[device]].cpu().numpy() for device, data in self._data.items()}

    def host(self, block: Block) -> NDArray[np.float64]:
        """The block's slots as fetched."""
        return self._host[block.device][block.offset : block.offset + block.width]

    def advance(self) -> None:
        """Begin the next step: blocks count as unwritten."""
        self.stamp += 1

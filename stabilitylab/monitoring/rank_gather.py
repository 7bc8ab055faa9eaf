"""Merges the telemetry of several processes that train one model, in one collective per measured step.

Every rank packs what its probes found into bytes: a header, then the buffer. One all-gather carries them to all; rank 0 joins them
by the names of the sites (``statistics.gathering``), and it alone judges and writes.

    header   int64: hash of the manifest, bytes used, step of the last alarm (-1 for none)

The *manifest* says which bytes belong to which site. There is one for every set of probes that measure together (gradients every
step, the rest every tenth), and a new one only when other sites appear, which is rare. Every rank sees from the headers that a
manifest is new to it; then all exchange manifests once and remember them. The alarm travels along so that all ranks measure more
densely from the same step on: a rank that measured alone would wait for the others forever.

All ranks must call ``Monitor.step`` with the same steps. The idea of one packed collective comes from OLMo-core's and ZClip's
batched metric reduction; theirs carry finished numbers, and hence means of kurtoses; ours carries sums.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from stabilitylab.statistics.transfer import Seen

Manifest = tuple[tuple[str, Seen], ...]
_HEADER = 24
# Manifests remembered of each rank.
_REMEMBERED = 16


@dataclass(frozen=True, slots=True)
class Received:
    """What all ranks found, each with its packet, and the step of the latest alarm."""

    found: list[tuple[Manifest, NDArray[np.uint8]]]
    alarm: int | None


class RankGather:
    """The processes of a group.

    Args:
        group: a process group; None for all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        on_gpu = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self._capacity = 0
        # By hash; every rank learns the same manifests in the same order, so all forget the same ones too.
        self._known: OrderedDict[int, Manifest] = OrderedDict()
        self._own: list[tuple[Manifest, int]] = []

    def exchange(self, manifest: Manifest, parts: Sequence[Tensor], alarm: int | None) -> Received:
        """Carry one measured step's numbers to all ranks. Every rank must call it for the same steps."""
        packet = (
            torch.cat([part.to(self._device) for part in parts])
            if parts
            else torch.empty(0, dtype=torch.uint8)
        )
        header = [self._hash(manifest), packet.numel(), -1 if alarm is None else alarm]
        received = self._gather(header, packet)
        headers = received[:, :_HEADER].copy().view(np.int64)
        news = any(int(h[0]) not in self._known for h in headers)
        if news or int(headers[:, 1].max()) > self._capacity:
            manifests: list[Manifest | None] = [None] * self.size
            dist.all_gather_object(manifests, manifest, self._group)
            for h, m in zip(headers, manifests, strict=True):
                self._known[int(h[0])] = m or ()
            while len(self._known) > _REMEMBERED * self.size:
                self._known.popitem(last=False)
            self._capacity = max(self._capacity, -(-int(headers[:, 1].max()) // 8) * 8)
            received = self._gather(header, packet)
        found = [
            (self._known[int(h[0])], row[_HEADER : _HEADER + int(h[1])])
            for row, h in zip(received, headers, strict=True)
        ]
        latest = int(headers[:, 2].max())
        return Received(found, None if latest < 0 else latest)

    def _hash(self, manifest: Manifest) -> int:
        """A hash that tells a manifest from others, computed once for each."""
        for own, known in self._own:
            if _same(manifest, own):
                return known
        digest = hashlib.blake2b(pickle.dumps(manifest), digest_size=8).digest()
        number = int.from_bytes(digest, "little", signed=True)
        self._own = [(manifest, number), *self._own[: _REMEMBERED - 1]]
        return number

    def _gather(self, header: list[int], packet: Tensor) -> NDArray[np.uint8]:
        """All ranks' headers and packets as rows; a packet larger than the capacity is left out."""
        sent = torch.zeros(_HEADER + self._capacity, dtype=torch.uint8, device=self._device)
        sent[:_HEADER] = torch.tensor(header, dtype=torch.int64).view(torch.uint8).to(self._device)
        if packet.numel() <= self._capacity:
            sent[_HEADER : _HEADER + packet.numel()] = packet.to(self._device)
        rows = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(rows, sent, group=self._group)
        return np.asarray(torch.stack(rows).cpu().numpy())


def _same(a: Manifest, b: Manifest) -> bool:
    """Whether two manifests hold the same objects: a probe that finds the same as before gives the same ``Seen``."""
    return len(a) == len(b) and all(x[0] == y[0] and x[1] is y[1] for x, y in zip(a, b, strict=True))


def several(group: dist.ProcessGroup | Literal["default"] | None) -> RankGather | None:
    """The processes of a group; None where there is only one."""
    if group is None or not has_process_group():
        return None
    ranks = RankGather(None if group == "default" else group)
    return ranks if ranks.size > 1 else None


def has_process_group() -> bool:
    """Whether gradients may be reduced over processes between backward pass and step; DDP does so with a single one too."""
    return dist.is_available() and dist.is_initialized()

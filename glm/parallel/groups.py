"""The process groups that a rank is in. Every rank makes all of them, in the same order, as torch asks."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from glm.parallel.partition import Share
from glm.parallel.topology import Topology


class Groups:
    """Groups of one rank.

    Args:
        topology: the axes.
        rank: this rank.
        timeout: how long to wait for a rank that does not answer.

    Attributes:
        tensor: the ranks that share each layer; None: no other.
    """

    def __init__(self, topology: Topology, rank: int, timeout: timedelta) -> None:
        self._rank, self._timeout = rank, timeout
        made = self._made(tuple(ranks) for ranks in topology.tensor_groups())
        self.tensor = next(iter(made.values()), None)

    def holders(self, shares: Iterable[Share]) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """The group of every set of holders with this rank in it, by their ranks."""
        return self._made(sorted({ranks for share in shares for ranks in share.holders}))

    def _made(self, all_ranks: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
        made = {}
        for ranks in all_ranks:
            if len(ranks) > 1:
                group = dist.new_group(list(ranks), timeout=self._timeout)
                if self._rank in ranks:
                    made[ranks] = group
        return made

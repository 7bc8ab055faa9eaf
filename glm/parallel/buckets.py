"""Buckets carry tensors with the same holders together: one collective for many of them.

A bucket is [holders, width]; row r is what holder r keeps of every tensor:

    reduce           sum of the holders' gradients, in fp32                          reduce-scatter: each gets its row
    depart, arrive   every holder's masters, rounded to the weights of all           all-gather, with a wait only at its use

Where all tensor ranks hold the same weight its gradient is equal on them, so each holder contributes 1/t of it.

In a *copied* bucket (ZeRO-0) every holder keeps all rows. The holders sum row by row as in any other and then exchange the sums, so
that all have the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these; the old names warn.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

BUCKET = 1 << 24  # elements of a share's buffer: 64 MB in fp32


@dataclass(frozen=True, kw_only=True, eq=False)
class Coming:
    """Weights on their way: the sent buffer, where they arrive, and how to wait for them."""

    sent: Tensor
    rows: Tensor
    work: dist.Work


class Bucket:
    """Some parameters with the same holders.

    Args:
        group: the holders.
        number: this rank's among them.
        factor: on every gradient.
        copied: every holder keeps all of each.
    """

    def __init__(self, group: dist.ProcessGroup, number: int, factor: float, *, copied: bool = False) -> None:
        self.group, self.number, self.factor, self.copied = group, number, factor, copied
        self.holders = dist.get_world_size(group)
        self.members: list[tuple[str, int, int]] = []  # name, elements of the part, of a share
        self.width = 0

    @property
    def names(self) -> list[str]:
        """Names of its parameters."""
        return [name for name, _, _ in self.members]

    def add(self, name: str, elements: int) -> None:
        share = -(-elements // self.holders)
        self.members.append((name, elements, share))
        self.width += share

    def reduce(self, gradients: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """This rank's part of the sums over the holders, flat: its shares, or all of a copied bucket. Absent gradients are 0."""
        rows = torch.zeros(self.holders, self.width, device=device)
        for name, elements, columns in self._columns():
            if (gradient := gradients.get(name)) is not None:
                flat = torch.zeros(self.holders * (columns.stop - columns.start), device=device)
                flat[:elements] = gradient.reshape(-1)
                rows[:, columns] = flat.view(self.holders, -1)
        if self.factor != 1.0:
            rows *= self.factor
        mine = torch.empty(self.width, device=device)
        _reduce_scatter(mine, rows.view(-1), group=self.group)
        if self.copied:
            _all_gather(rows.view(-1), mine, group=self.group)
            return {name: self._whole(rows, columns, elements) for name, elements, columns in self._columns()}
        return {name: self._share(mine[columns], elements) for name, elements, columns in self._columns()}

    def depart(self, masters: Mapping[str, Tensor], like: Tensor) -> Coming:
        """Send this rank's masters, rounded to the format of ``like``, and do not wait for the others'."""
        mine = torch.zeros(self.width, dtype=like.dtype, device=like.device)
        for name, _, columns in self._columns():
            share = masters[name].detach().reshape(-1)
            mine[columns.start : columns.start + share.numel()] = share
        rows = mine.new_empty(self.holders * self.width)
        return Coming(sent=mine, rows=rows, work=_all_gather(rows, mine, group=self.group, async_op=True))

    def arrive(self, coming: Coming, live: Mapping[str, Tensor]) -> None:
        """Wait for all holders' masters and put them into the weights, whose memory may have been freed."""
        coming.work.wait()
        rows = coming.rows.view(self.holders, -1)
        for name, elements, columns in self._columns():
            # Not through the parameter: autograd would count the weights, in use by a backward pass, as modified.
            weight = live[name].data
            if not weight.untyped_storage().size():
                weight.untyped_storage().resize_(weight.numel() * weight.element_size())
            weight.copy_(self._whole(rows, columns, elements).view(weight.shape))

    def free(self, live: Mapping[str, Tensor]) -> None:
        """Free the weights' memory; autograd's views of them find them there again after ``arrive``."""
        for name in self.names:
            live[name].data.untyped_storage().resize_(0)

    def _columns(self) -> Iterator[tuple[str, int, slice]]:
        at = 0
        for name, elements, share in self.members:
            yield name, elements, slice(at, at + share)
            at += share

    def _share(self, padded: Tensor, elements: int) -> Tensor:
        first = self.number * padded.numel()
        return padded[: max(0, min(elements - first, padded.numel()))]

    def _whole(self, rows: Tensor, columns: slice, elements: int) -> Tensor:
        return rows[:, columns].reshape(-1)[:elements]

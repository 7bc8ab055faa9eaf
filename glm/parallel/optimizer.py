"""ZeRO-1: AdamW of which every rank updates its share, with the local optimizer's arithmetic.

    g_share = sum over holders of g, in fp32                 reduce-scatter
    update  = MixedPrecisionAdamW on the share                clip by the norm over all ranks
    weights = round(master), all shares                       all-gather

(Rajbhandari et al., 1910.02054, P_os.) The update is elementwise, so a share's is what one process would compute; only the order
in which gradients are summed differs. Masters, moments and reduced gradients take 1/n of the memory, n holders
(``glm.parallel.shares``). Gradients of weights that all tensor ranks hold alike are equal there; each holder contributes 1/t of it.

Tensors go in buckets, so that a collective carries many of them and the buffers stay small. Squares of norms are summed over ranks
in fp64.

Why not DeepSpeed's ZeRO: it refuses fp16 on CPUs without half-precision units, has another optimizer for bf16, and flattens away
the tensors whose norms, per-tensor rates (StableAdamW) and telemetry are needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glm.parallel.shares import Share
from glm.precision import Policy
from glm.train.optimizer import MixedPrecisionAdamW, OptimizerConfig

# Since torch 2.13 under new names; the old ones warn.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

BUCKET = 1 << 24  # elements of a share's buffer: 64 MB in fp32


class _Bucket:
    """Some parameters with the same holders, laid out as [holders, width]: a row is what one holder keeps."""

    def __init__(self, group: dist.ProcessGroup, number: int, factor: float) -> None:
        self.group, self.number, self.factor = group, number, factor
        self.holders = dist.get_world_size(group)
        self.members: list[tuple[str, int, int]] = []  # name, elements of the part, of a share
        self.width = 0

    def add(self, name: str, elements: int) -> None:
        share = -(-elements // self.holders)
        self.members.append((name, elements, share))
        self.width += share

    def reduce(self, gradients: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """This rank's shares of the sums over the holders, fp32. Absent gradients are 0."""
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
        return {name: self._share(mine[columns], elements) for name, elements, columns in self._columns()}

    def publish(self, masters: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
        """Round every holder's masters into the weights of all."""
        first = next(iter(live.values()))
        mine = torch.zeros(self.width, dtype=first.dtype, device=first.device)
        for name, _, columns in self._columns():
            share = masters[name].reshape(-1)
            mine[columns.start : columns.start + share.numel()] = share
        rows = mine.new_empty(self.holders * self.width)
        _all_gather(rows, mine, group=self.group)
        for name, elements, columns in self._columns():
            whole = rows.view(self.holders, -1)[:, columns].reshape(-1)[:elements]
            live[name].copy_(whole.view(live[name].shape))

    def _columns(self) -> list[tuple[str, int, slice]]:
        found, at = [], 0
        for name, elements, share in self.members:
            found.append((name, elements, slice(at, at + share)))
            at += share
        return found

    def _share(self, padded: Tensor, elements: int) -> Tensor:
        first = self.number * padded.numel()
        return padded[: max(0, min(elements - first, padded.numel()))]


class ShardedAdamW(MixedPrecisionAdamW):
    """AdamW over this rank's shares.

    Args:
        model: this rank's part of the model, in fp32, its parameters under the whole model's names.
        config, policy: as for one process.
        shares: of every parameter of the whole model.
        rank: this rank.
        groups: process groups of the holders that this rank is among, by their ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        policy: Policy,
        *,
        shares: Mapping[str, Share],
        rank: int,
        groups: Mapping[tuple[int, ...], dist.ProcessGroup],
    ) -> None:
        self._shares, self._rank = shares, rank
        self._numbers = {name: number for number, name in enumerate(shares)}
        self._sizes = torch.tensor([share.shape.numel() for share in shares.values()], dtype=torch.float64)
        super().__init__(model, config, policy)
        self._device = next(iter(self._live.values())).device
        self._buckets = self._fill(groups)

    def _make_masters(self, initial: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        masters = {}
        for name, live in self._live.items():
            share, place = self._shares[name], self._shares[name].place(self._rank)
            assert place is not None
            if len(share.holders[place[0]]) == 1:
                masters[name] = nn.Parameter(initial[name]) if initial else live
            else:
                whole = initial[name] if initial else live.detach()
                masters[name] = nn.Parameter(share.share(whole, self._rank).clone())
        return masters

    def _fill(self, groups: Mapping[tuple[int, ...], dist.ProcessGroup]) -> list[_Bucket]:
        filling: dict[tuple[tuple[int, ...], float], _Bucket] = {}
        done = []
        for name, live in self._live.items():
            part, number = self._shares[name].place(self._rank) or (0, 0)
            ranks = self._shares[name].holders[part]
            if len(ranks) == 1:
                continue
            factor = self._shares[name].alike
            bucket = filling.setdefault((ranks, factor), _Bucket(groups[ranks], number, 1 / factor))
            bucket.add(name, live.numel())
            if bucket.width >= BUCKET:
                done.append(filling.pop((ranks, factor)))
        return done + list(filling.values())

    def _found(self) -> dict[str, Tensor]:
        gradients = self.accumulated()
        reduced: dict[str, Tensor] = {}
        for bucket in self._buckets:
            reduced |= bucket.reduce(gradients, self._device)
        alone = {name: gradient.float() for name, gradient in gradients.items() if name not in reduced}
        both = reduced | alone
        return {name: both[name] for name in self._live if name in both}

    def _norms(self, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        own, total = super()._norms(found)
        if dist.get_world_size() == 1:
            return own, total
        squares = self._summed({name: norm.double().square() for name, norm in own.items()})
        norms = squares.sqrt()
        return {name: norms[self._numbers[name]].float() for name in found}, math.sqrt(float(squares.sum()))

    def _summed(self, values: Mapping[str, Tensor]) -> Tensor:
        """Scalars of shares summed over all ranks, as one fp64 vector over the whole model's parameters."""
        total = torch.zeros(len(self._numbers), dtype=torch.float64, device=self._device)
        for name, value in values.items():
            total[self._numbers[name]] = value
        dist.all_reduce(total)
        return total

    def _rates(
        self, rate: float, gradients: list[Tensor], second: list[Tensor], correction2: float
    ) -> list[float]:
        if not self.config.update_clipping:
            return [rate] * len(gradients)
        least = self.config.epsilon**2
        names = {id(master.grad): name for name, master in self._masters.items()}
        own = [names[id(g)] for g in gradients]
        ratios = {
            name: (g.square() / (v / correction2).clamp_min(least)).double().sum()
            for name, g, v in zip(own, gradients, second, strict=True)
        }
        means = (self._summed(ratios) / self._sizes.to(self._device)).tolist()
        return [rate / max(1.0, math.sqrt(means[self._numbers[name]])) for name in own]

    def _publish(self) -> None:
        gathered = set()
        with torch.no_grad():
            for bucket in self._buckets:
                bucket.publish(self._masters, self._live)
                gathered |= {name for name, _, _ in bucket.members}
            if self.policy.has_masters:
                for name, live in self._live.items():
                    if name not in gathered:
                        live.copy_(self._masters[name])

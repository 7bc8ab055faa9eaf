"""ZeRO: every rank makes its share of an update, with the local optimizer's arithmetic.

    g_share = sum over holders of g, in fp32                 reduce-scatter
    update  = MixedPrecisionAdamW on the share                clip by the norm over all ranks
    weights = round(master), all shares                       all-gather

(Rajbhandari et al., 1910.02054.) Where the rule is elementwise a share's update is what one process would compute; only the order
of summing gradients differs. Rules of whole matrices need whole matrices: ``TrainConfig`` refuses them elsewhere. A rank, one of n
holders, holds (``glm.parallel.partition``):

| stage | masters, moments | gradients between micro-batches | weights |
| --- | --- | --- | --- |
| 0 | all | all of its own | all |
| 1 | 1/n | all of its own, summed over the holders once an update | all |
| 2 | 1/n | 1/n, summed after each micro-batch's backward pass of a layer | all |
| 3 | 1/n | 1/n | none at rest: rounded from the masters and gathered when a layer needs them |

In stages 2 and 3 ``glm.parallel.zero`` says when. There the optimizer accumulates the summed shares in the format of one process
(``glm.precision.policy``), so fp16 overflows where it would there.

Tensors go in buckets (``glm.parallel.buckets``), so that a collective carries many of them and the buffers stay small. Ranks sum
the squares of norms in fp64, each element once.

Why not a library's: DeepSpeed refuses fp16 on CPUs without half-precision units, has another optimizer for bf16, and flattens
tensors, while norms, per-tensor rates (StableAdamW) and telemetry need them one by one. torch's ``fully_shard`` spreads over
replicas alone: t tensor ranks would each keep, and count, a share of what they hold alike; and it accumulates in one format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glm.parallel.buckets import BUCKET, Bucket, Coming
from glm.parallel.partition import Share, unit_of
from glm.precision import PrecisionPolicy
from glm.train.optimizer import MixedPrecisionAdamW
from glm.train.update_rules import OptimizerConfig


class ShardedAdamW(MixedPrecisionAdamW):
    """AdamW over this rank's shares.

    Args:
        model: this rank's part of the model, in fp32, its parameters under the whole model's names.
        config, policy: as for one process.
        shares: of every parameter of the whole model.
        rank: this rank.
        groups: process groups of the holders with this rank among them, by their ranks.
        zero: the stage.
        peak, factors: as for one process.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        policy: PrecisionPolicy,
        *,
        shares: Mapping[str, Share],
        rank: int,
        groups: Mapping[tuple[int, ...], dist.ProcessGroup],
        zero: int = 1,
        peak: float = 1.0,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        self._shares, self._rank, self.zero = shares, rank, zero
        self._counted = {name for name, share in shares.items() if rank in share.ranks()}
        self._numbers = {name: number for number, name in enumerate(shares)}
        self._sizes = torch.tensor([share.shape.numel() for share in shares.values()], dtype=torch.float64)
        super().__init__(model, config, policy, peak=peak, factors=factors)
        self._device = next(iter(self._live.values())).device
        self._buckets = self._fill(groups)
        self._reduced: set[str] = set()
        # Units whose weights exist only while in use.
        self._absent: set[str] = set()

    def _make_masters(self, initial: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        masters = {}
        for name, live in self._live.items():
            whole = initial[name] if initial else live
            share = self._shares[name].share(whole, self._rank)
            if share is not whole:
                masters[name] = nn.Parameter(share.detach().clone())
            else:
                masters[name] = nn.Parameter(whole) if initial else live
        return masters

    def _fill(self, groups: Mapping[tuple[int, ...], dist.ProcessGroup]) -> dict[str, list[Bucket]]:
        """Buckets by unit: the rank reduces, and gathers, a unit at one time."""
        filling: dict[tuple[str, tuple[int, ...], float], Bucket] = {}
        done: dict[str, list[Bucket]] = {}
        for name, live in self._live.items():
            share = self._shares[name]
            part, number = share.place(self._rank) or (0, 0)
            ranks = share.holders[part]
            if len(ranks) == 1:
                continue
            key = unit_of(name) if self.zero >= 2 else "", ranks, 1 / share.alike
            if key not in filling or filling[key].width >= BUCKET:
                filling[key] = Bucket(groups[ranks], number, 1 / share.alike, copied=share.copied)
                done.setdefault(key[0], []).append(filling[key])
            filling[key].add(name, live.numel())
        return done

    # ------------------------------------------------------------------------------------------------ gradients

    def accumulate(self) -> None:
        for unit in self._buckets if self.zero >= 2 else ():
            self.reduce(unit)
        self._reduced.clear()
        super().accumulate()

    @torch.no_grad()
    def reduce(self, unit: str) -> None:
        """In stages 2 and 3, once a micro-batch: sum a unit's gradients over the holders and keep this rank's share."""
        if unit in self._reduced:
            return
        self._reduced.add(unit)
        dtype = torch.float32 if self.policy.accumulates_in_fp32 else self.policy.compute_dtype
        for bucket in self._buckets.get(unit, ()):
            own = {name: g for name in bucket.names if (g := self._live[name].grad) is not None}
            for name, share in bucket.reduce(own, self._device).items():
                self._live[name].grad = None
                if name in self._accumulated:
                    self._accumulated[name] += share
                else:
                    self._accumulated[name] = share.to(dtype)

    def accumulated(self) -> dict[str, Tensor]:
        return {**super().accumulated(), **self._accumulated}

    def _found(self) -> dict[str, Tensor]:
        if self.zero >= 2:
            return super()._found()
        gradients = self.accumulated()
        reduced: dict[str, Tensor] = {}
        for bucket in self._buckets.get("", ()):
            for name, share in bucket.reduce(gradients, self._device).items():
                reduced[name] = share.view(self._masters[name].shape)
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
        for name in self._counted & values.keys():
            total[self._numbers[name]] = values[name]
        dist.all_reduce(total)
        return total

    def _total(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        totals = self._summed(sums)
        return {name: totals[number] for name, number in self._numbers.items()}

    def _whole_sizes(self) -> Mapping[str, int]:
        return {name: share.shape.numel() for name, share in self._shares.items()}

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

    # -------------------------------------------------------------------------------------------------- weights

    def fetch(self, unit: str) -> list[Coming]:
        """Start the exchange of all holders' masters of a unit; ``place`` takes them."""
        return [
            bucket.depart(self._masters, self._live[bucket.names[0]])
            for bucket in self._buckets.get(unit, ())
        ]

    def place(self, unit: str, coming: list[Coming]) -> None:
        """Make a unit's weights from the masters that ``fetch`` asked for."""
        for bucket, one in zip(self._buckets.get(unit, ()), coming, strict=True):
            bucket.arrive(one, self._live)

    def free(self, unit: str) -> None:
        """Free the memory of a unit's weights until ``fetch`` gets them again; only the masters remain."""
        self._absent.add(unit)
        for bucket in self._buckets.get(unit, ()):
            bucket.free(self._live)

    def publish(self) -> None:
        gathered = set()
        with torch.no_grad():
            for unit, buckets in self._buckets.items():
                spread = [bucket for bucket in buckets if not bucket.copied]
                if unit not in self._absent:
                    for bucket in spread:
                        bucket.arrive(bucket.depart(self._masters, self._live[bucket.names[0]]), self._live)
                gathered |= {name for bucket in spread for name in bucket.names}
            if self.policy.has_masters:
                for name, live in self._live.items():
                    if name not in gathered:
                        live.copy_(self._masters[name])

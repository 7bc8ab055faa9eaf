"""Which rank holds which elements of a parameter.

A parameter is cut twice. *Tensor parallelism* cuts the weight by which a rank multiplies; *ZeRO* (Rajbhandari et al., 1910.02054)
then cuts what the optimizer keeps of it, master and moments, over all ranks that multiply by the same part:

    whole  --cut over t tensor ranks-->  part  --cut over its n holders-->  share

| parameter | part | holders of a part |
| --- | --- | --- |
| query, key, value; up | rows, within each of q, k, v (a, b of a gated layer) | the d replicas of its stage |
| attention output; down | columns | the d replicas |
| gate and learned sinks of attention | rows, by head | the d replicas |
| embedding, output projection | vocabulary | the d replicas; where tied, those of the first and of the last stage |
| norms, biases of the outputs, learned positions | whole | all t d ranks of its stage |

So every element of every master, moment and reduced gradient is on exactly one rank: sums over ranks count nothing twice, and a
checkpoint puts shares end to end.

A share is a run of ceil(numel / n) elements of the flattened part; the last holders may have fewer, or none. With one holder it is
the part itself, in its own shape. ZeRO's stages 1 to 3 share the same way. Stage 0 has no second cut: every holder keeps the part,
and the first holder's counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm.model.config import ModelConfig
from glm.parallel.topology import Topology
from glm.planning.layout import stage_layers


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A cut over tensor ranks.

    Attributes:
        dim: the dimension cut.
        blocks: equal blocks along it, each cut by itself.
    """

    dim: int
    blocks: int = 1

    def part(self, whole: Tensor, index: int, parts: int) -> Tensor:
        """One rank's part, a new tensor."""
        size = whole.shape[self.dim] // (self.blocks * parts)
        shape = list(whole.shape)
        shape[self.dim : self.dim + 1] = [self.blocks, parts, size]
        cut = whole.reshape(shape).select(self.dim + 1, index)
        # Not a view, which would keep the whole in memory.
        return cut.flatten(self.dim, self.dim + 1).clone(memory_format=torch.contiguous_format)

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """All ranks' parts put together."""
        shape = list(parts[0].shape)
        shape[self.dim : self.dim + 1] = [self.blocks, shape[self.dim] // self.blocks]
        blocks = [part.reshape(shape) for part in parts]
        return torch.stack(blocks, dim=self.dim + 1).flatten(self.dim, self.dim + 2)


@dataclass(frozen=True, kw_only=True)
class Share:
    """How one parameter lies over the ranks.

    Attributes:
        name: in the whole model.
        shape: of the whole.
        cut: over tensor ranks; None: each has the whole.
        holders: ranks that hold each part, by the part's number; one part if there is no cut.
        alike: tensor ranks that compute the same gradient.
        copied: every holder keeps the whole part.
    """

    name: str
    shape: torch.Size
    cut: Cut | None
    holders: tuple[tuple[int, ...], ...]
    alike: int = 1
    copied: bool = False

    def place(self, rank: int) -> tuple[int, int] | None:
        """(part, number among its holders) of a rank; None if it holds nothing."""
        for part, ranks in enumerate(self.holders):
            if rank in ranks:
                return part, ranks.index(rank)
        return None

    def ranks(self) -> list[int]:
        """Ranks whose shares together are the whole, each element once: every holder, or for copies the first."""
        return sorted(rank for part in range(len(self.holders)) for rank in self._keepers(part))

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """The part by which a rank multiplies."""
        index, _ = self._at(rank)
        return whole if self.cut is None else self.cut.part(whole, index, len(self.holders))

    def share(self, part: Tensor, rank: int) -> Tensor:
        """The share of its part that a rank's optimizer keeps: a view, or the part itself where it is not cut."""
        index, number = self._at(rank)
        holders = len(self.holders[index])
        if holders == 1 or self.copied:
            return part
        width = -(-part.numel() // holders)
        return part.reshape(-1)[number * width : (number + 1) * width]

    def whole(self, shares: Mapping[int, Tensor]) -> Tensor:
        """The whole from the shares of ``ranks()``, by rank."""
        parts = range(len(self.holders))
        rows = [torch.cat([shares[rank].reshape(-1) for rank in self._keepers(part)]) for part in parts]
        if self.cut is None:
            return rows[0].view(self.shape)
        shape = list(self.shape)
        shape[self.cut.dim] //= len(self.holders)
        return self.cut.whole([row.view(shape) for row in rows])

    def _keepers(self, part: int) -> tuple[int, ...]:
        return self.holders[part][:1] if self.copied else self.holders[part]

    def _at(self, rank: int) -> tuple[int, int]:
        place = self.place(rank)
        if place is None:
            raise KeyError(f"rank {rank} holds nothing of {self.name}")
        return place


def shares(
    shapes: Mapping[str, torch.Size], config: ModelConfig, topology: Topology, *, zero: int = 1
) -> dict[str, Share]:
    """Every parameter's share, in the order of ``shapes``.

    Args:
        shapes: of the whole model's parameters, by name.
        config: the model.
        topology: the axes.
        zero: ZeRO's stage.
    """
    t, p, d = topology.tensor, topology.pipeline, topology.data
    found = {}
    for name, shape in shapes.items():
        cut = _cut(name, config) if t > 1 else None
        tied = name == "embedding.weight" and config.embedding.tied
        stages = sorted({0, p - 1}) if tied else [stage_of(name, config, p)]
        columns = [[i] for i in range(t)] if cut is not None else [list(range(t))]
        holders = tuple(
            tuple(
                topology.rank(stage, replica, i) for stage in stages for replica in range(d) for i in column
            )
            for column in columns
        )
        found[name] = Share(
            name=name,
            shape=shape,
            cut=cut,
            holders=holders,
            alike=t if cut is None else 1,
            copied=zero == 0,
        )
    return found


def stage_of(name: str, config: ModelConfig, stages: int) -> int:
    """The pipeline stage of a parameter or module; the first one's of a tied embedding."""
    first, _, rest = name.partition(".")
    if first != "layers":
        return stages - 1 if first in ("final_norm", "projection") else 0
    layer = int(rest.partition(".")[0])
    for stage, count in enumerate(stage_layers(config.layers, stages)):
        layer -= count
        if layer < 0:
            return stage
    raise KeyError(name)


def unit_of(name: str) -> str:
    """The unit with which ZeRO's stages 2 and 3 reduce and gather a parameter: its layer, its matrix, or the end norms."""
    first, _, rest = name.partition(".")
    if first == "layers":
        return f"layers.{rest.partition('.')[0]}"
    return {"embedding": "embedding", "positions": "embedding", "projection": "projection"}.get(
        first, "norms"
    )


def _cut(name: str, config: ModelConfig) -> Cut | None:
    module, _, kind = name.rpartition(".")
    last = module.rpartition("attention.")[2] if ".attention." in module else module.rpartition(".")[2]
    if last == "query_key_value":
        return Cut(dim=0, blocks=3)
    if last == "up":
        return Cut(dim=0, blocks=2 if config.feed_forward.is_gated else 1)
    if last == "gate" or kind == "sink_H":
        return Cut(dim=0)
    if last in ("output", "down") and kind == "weight":
        return Cut(dim=1)
    return Cut(dim=0) if module in ("embedding", "projection") else None

"""A transformer as the stages of DeepSpeed's PipelineModule.

The model's own parts form a row: look-up, layers, final norm and loss. A stage holds a run of them
(``glm.planning.layout.stage_layers``). Only hidden states travel between stages: mask, positions and targets are a function of the
sample numbers, so every rank has those of its micro-batches, in the order in which one-forward-one-backward asks for them.

A tied embedding is on the first and on the last stage. Both hold its weight; the optimizer sums its gradient over both.

Dropout masks are a function of each row's key and the place (``glm.model.dropout``), so tensor ranks agree, and masks are those of
one process however many stages and replicas there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor

from glm.model.config import ModelConfig
from glm.model.experts import penalties
from glm.model.passes import recomputed
from glm.model.positions import visible
from glm.model.transformer import Transformer
from glm.model.vocabulary_loss import vocabulary_losses
from glm.parallel.vocabulary_loss import split_vocabulary_losses
from glm.planning.layout import stage_layers

# tokens, targets, positions, segments, context, keys of the dropout masks
MicroBatch = tuple[Tensor, ...]
# Place in the row (0: look-up, k + 1: layer k, L + 1: loss), the computation there, and its input.
Around = Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor]


def _plainly(place: int, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    del place
    return compute(x)


class Feed:
    """What a stage needs beside the hidden states, for the current micro-batch.

    Attributes:
        around: computes each part of the row; ``glm.parallel.zero`` does more around it.
        begun: called with the number of each micro-batch of the update before the stage computes it.
    """

    def __init__(self, model: Transformer, tensor: dist.ProcessGroup | None) -> None:
        self.model, self.tensor = model, tensor
        self.waiting: list[MicroBatch] = []
        self.scale = 1.0
        self.losses: list[Tensor] = []
        self.around: Around = _plainly
        self.begun: Callable[[int], None] | None = None
        self._number = 0

    def begin(self, micro_batches: Sequence[MicroBatch], *, scale: float) -> None:
        """Begin an update.

        Args:
            micro_batches: this replica's.
            scale: factor on each micro-batch's summed loss.
        """
        self.waiting, self.scale, self.losses, self._number = list(micro_batches), scale, [], 0

    def advance(self, dtype: torch.dtype) -> None:
        """Go to the next micro-batch."""
        if self.begun is not None:
            self.begun(self._number)
        self._number += 1
        self.tokens_BT, self.targets_BT, self.positions, segments_BT, context_BT, keys_B = self.waiting.pop(0)
        self.keys_B = keys_B if self.model.config.dropout else None
        bias_BHTS, self.turned = self.model.surroundings(
            self.positions, visible(segments_BT, context_BT), dtype
        )
        if self.tensor is not None and bias_BHTS.shape[1] > 1:
            # ALiBi: each rank's heads have slopes of their own.
            bias_BHTS = bias_BHTS.chunk(dist.get_world_size(self.tensor), dim=1)[dist.get_rank(self.tensor)]
        self.bias_BHTS: Tensor = bias_BHTS
        self.dtype = dtype


class Stages(PipelineModule):  # type: ignore[misc]
    """This rank's stage.

    Args:
        model: this rank's part, from ``glm.parallel.sharded_init``.
        config: the model's shape.
        axes: DeepSpeed's topology.
        tensor: the ranks that share each layer; None: no other.
    """

    def __init__(
        self,
        model: Transformer,
        config: ModelConfig,
        axes: Any,
        *,
        tensor: dist.ProcessGroup | None,
    ) -> None:
        self._counts = stage_layers(config.layers, axes.get_dim("pipe"))
        self.dtype = next(model.parameters()).dtype
        feed = Feed(model, tensor)
        row = [_start(feed), *(_layer(feed, number) for number in range(config.layers)), _end(feed)]
        super().__init__(row, topology=axes, partition_method="uniform")
        self.feed, self.model = feed, model

    def _partition_layers(self, method: str = "uniform") -> None:
        del method
        ends = [0]
        for count in self._counts:
            ends.append(ends[-1] + count)
        ends = [0, *(end + 1 for end in ends[1:])]
        ends[-1] += 1
        self.parts = ends
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=ends[stage], stop=ends[stage + 1])

    def forward(self, forward_input: Tensor) -> Tensor:
        self.feed.advance(self.dtype)
        out: Tensor = super().forward(forward_input)
        return out


def _start(feed: Feed) -> Callable[[Tensor], Tensor]:
    def look_up(tokens_BT: Tensor) -> Tensor:
        return feed.model.embed(tokens_BT, feed.positions, feed.keys_B)

    return lambda tokens_BT: feed.around(0, look_up, tokens_BT)


def _layer(feed: Feed, number: int) -> Callable[[Tensor], Tensor]:
    def through(x_BTC: Tensor) -> Tensor:
        layer = feed.model.layers[number]
        given = x_BTC, feed.bias_BHTS, feed.turned, None, feed.keys_B
        if feed.model.config.recompute:
            return recomputed(layer, *given)
        out: Tensor = layer(*given)
        return out

    return lambda x_BTC: feed.around(number + 1, through, x_BTC)


def _end(feed: Feed) -> Callable[[Tensor], Tensor]:
    def loss(x_BTC: Tensor) -> Tensor:
        model = feed.model
        x_BTC = model.close(x_BTC)
        chosen = feed.targets_BT >= 0
        hidden_NC, weight_VC, target_N = x_BTC[chosen], model.output_weight(), feed.targets_BT[chosen]
        z_loss, cap = model.config.z_loss, model.config.logit_cap
        total, of_z = (
            vocabulary_losses(hidden_NC, weight_VC, target_N, z_loss, cap)
            if feed.tensor is None
            else split_vocabulary_losses(hidden_NC, weight_VC, target_N, z_loss, feed.tensor, cap)
        )
        if model.config.feed_forward.experts.count:
            penalty = len(target_N) * penalties(model)
            total, of_z = total + penalty, of_z + penalty.detach()
        feed.losses.append(torch.stack([total.detach() - of_z, of_z]))
        return total * feed.scale

    return lambda x_BTC: feed.around(feed.model.config.layers + 1, loss, x_BTC)

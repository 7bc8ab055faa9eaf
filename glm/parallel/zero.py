"""ZeRO-2 and ZeRO-3: a rank has gradients, and weights, only while it computes with them.

For layer k of L, W_k its weights and g_k their gradient (Rajbhandari et al., 1910.02054, P_os+g and P_os+g+p):

    forward     [3: wait for W_k, ask for W_k+1]   x = layer_k(x)               [3: free W_k]
    backward    [3: wait for W_k, ask for W_k-1]   dx, g_k                      [3: free W_k]   reduce-scatter g_k, free it

So a rank holds weights of two neighbouring layers, and one layer's gradient, at a time. It gathers the embedding for the look-up
and, where it is tied, again for the loss, which forms gradients in its forward pass; backward needs no embedding. It reduces the
embedding's gradient last, since both ends add to it. Norms outside the layers are 2 h numbers each and stay.

Forward, the parts of the row run in turn; backward, two identities in autograd's graph tell when a part begins and ends. Autograd
runs what was recorded later first, so it has all gradients of a layer's weights when it reaches the identity before the layer; a
recomputed layer finds its weights gathered.

All holders of a part must do this equally often. A replica with fewer micro-batches than another joins the collectives all the same
(``idle``).

Limits: one pipeline stage, since 1F1B would repeat the collectives for every micro-batch in flight. The rank waits for the
reduction, not for gathers ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm.model.config import ModelConfig
from glm.parallel.buckets import Coming
from glm.parallel.optimizer import ShardedAdamW


class Spreading:
    """Reduces gradients, and gathers and frees weights, when their turn comes.

    Args:
        optimizer: keeps the shares; its stage is 2 or 3. In stage 3 this class frees the weights.
        config: the model.
    """

    def __init__(self, optimizer: ShardedAdamW, config: ModelConfig) -> None:
        self._optimizer = optimizer
        layers = [f"layers.{number}" for number in range(config.layers)]
        matrix = "embedding" if config.embedding.tied else "projection"
        self._row = ["embedding", *layers, matrix]
        # In the order of use: the layers once more, backward.
        self._order = [*self._row, *reversed(layers)]
        self._gathers = optimizer.zero == 3
        self._coming: dict[str, list[Coming]] = {}
        self._ends = {0, len(layers) + 1}
        if self._gathers:
            for unit in self._row:
                optimizer.free(unit)

    def around(self, place: int, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """One part of the row, from x.

        Args:
            place: 0 is the look-up, k + 1 layer k, L + 1 the loss.
            compute: computes it.
            x: its input.
        """
        if x.is_floating_point():
            x = _told(x, lambda: self._backward_ends(place))
        self._gather(place)
        y = compute(x)
        self._free(place)
        return _told(y, lambda: self._backward_begins(place))

    def idle(self) -> None:
        """Take part in the collectives of a micro-batch that this replica does not have."""
        for place in range(len(self._row)):
            self._gather(place)
            self._free(place)
        for place in reversed(range(1, len(self._row))):
            self._backward_begins(place)
            self._backward_ends(place)
        self._optimizer.accumulate()

    def _backward_begins(self, place: int) -> None:
        if place not in self._ends:
            self._gather(len(self._order) - place)

    def _backward_ends(self, place: int) -> None:
        if place not in self._ends:
            self._free(place)
        if self._row[place] != "embedding":
            self._optimizer.reduce(self._row[place])

    def _gather(self, turn: int) -> None:
        """Have the weights of this turn, and start gathering those of the next."""
        if not self._gathers:
            return
        unit = self._order[turn]
        if unit not in self._coming:
            self._coming[unit] = self._optimizer.fetch(unit)
        self._optimizer.place(unit, self._coming.pop(unit))
        if turn + 1 < len(self._order):
            coming = self._order[turn + 1]
            self._coming[coming] = self._optimizer.fetch(coming)

    def _free(self, place: int) -> None:
        if self._gathers:
            self._optimizer.free(self._row[place])


class _Told(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tell: Callable[[], None]) -> Tensor:
        ctx.tell = tell
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.tell()
        return grad, None


def _told(x: Tensor, tell: Callable[[], None]) -> Tensor:
    """x; calls ``tell`` when its gradient passes."""
    result: Tensor = _Told.apply(x, tell)  # type: ignore[no-untyped-call]
    return result

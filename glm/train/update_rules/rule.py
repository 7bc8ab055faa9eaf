"""What an update rule is: pure functions of gradients and of what is remembered of them.

    names                             of what is remembered of a parameter, in fp32
    directions(g, state, t, config)   u of every tensor; the state is moved on in place

and whatever the rule, an update is

    w <- w - rate * decay * w - rate * u

Masters, clipping, decay, groups, telemetry and checkpoints are shared (``glm.train.optimizer``); a rule knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm.train.update_rules.config import OptimizerConfig

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """The tensors of a group, one entry each.

    Attributes:
        gradients: fp32, clipped; a rule leaves them as they are.
        states: what is remembered of each.
        rows: how many rows each of the matrices has that a weight is made of, one above the other; None: it is one.
    """

    gradients: Sequence[Tensor]
    states: Sequence[State]
    rows: Sequence[tuple[int, ...] | None]


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """An update rule.

    Attributes:
        names: of what is remembered of a weight.
        directions: u of every tensor at update t, from 1.
        of_matrices: it is for hidden matrices only, and AdamW updates the rest.
        make: what is remembered at first; None: zeros in the weight's shape.
    """

    names: tuple[str, ...]
    directions: Callable[[Tensors, int, OptimizerConfig], list[Tensor]]
    of_matrices: bool = False
    make: Callable[[Tensor], State] | None = None

    def state(self, weight: Tensor) -> State:
        """What is remembered of a weight, before the first update."""
        if self.make is not None:
            return self.make(weight)
        return {name: torch.zeros_like(weight) for name in self.names}

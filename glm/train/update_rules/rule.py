"""An update rule: pure functions of gradients and of the state that the rule keeps.

    names                             of the tensors kept for a parameter, in fp32
    directions(g, state, t, config)   u of every tensor; advances the state in place

and whatever the rule, an update is

    w <- w - rate * decay * w - rate * u

``glm.train.optimizer`` has masters, clipping, decay, groups, telemetry and checkpoints for all; a rule knows none of them.
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
        gradients: fp32, clipped; a rule does not change them.
        states: the state of each.
        rows: number of rows of each matrix in a weight of several, one above the other; None: it is one.
    """

    gradients: Sequence[Tensor]
    states: Sequence[State]
    rows: Sequence[tuple[int, ...] | None]


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """An update rule.

    Attributes:
        names: of the tensors in a weight's state.
        directions: u of every tensor at update t, from 1.
        make: makes the first state; None: zeros in the weight's shape.
    """

    names: tuple[str, ...]
    directions: Callable[[Tensors, int, OptimizerConfig], list[Tensor]]
    make: Callable[[Tensor], State] | None = None

    def state(self, weight: Tensor) -> State:
        """A weight's state before the first update."""
        if self.make is not None:
            return self.make(weight)
        return {name: torch.zeros_like(weight) for name in self.names}

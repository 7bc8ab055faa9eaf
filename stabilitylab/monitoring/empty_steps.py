"""Notices an optimizer that steps although none of its parameters has a gradient, and so changes nothing.

torch's optimizers skip a parameter whose ``.grad`` is None. Two mistakes make every step an empty one, without an error and with a
loss curve that looks as if the learning rate were too small: ``zero_grad()`` between the backward pass and the step, and an
optimizer built from another model's parameters (those of a copy, or of the model before it was wrapped or converted).

    empty step:  p.grad is None for every p before the step, and the step leaves the smallest p as it was, bit for bit

The second half excludes optimizers that hold gradients elsewhere (Transformer Engine's ``decoupled_grad``, fused backward passes).
A healthy step costs one look at one ``.grad``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stabilitylab.compat import is_dtensor

_log = logging.getLogger("stabilitylab")

# A GAN's optimizers take turns, a warm-up may freeze all for a step: only several in a row are a slip.
IN_A_ROW = 3


class EmptySteps:
    """Counts each optimizer's consecutive empty steps, and reports the third, once.

    Args:
        model_parameters: by name, those of the model that is trained.
        tell: called with the kind and data of an event.
    """

    def __init__(
        self, model_parameters: Mapping[str, Tensor], tell: Callable[[str, Mapping[str, Any]], None]
    ) -> None:
        self._mine = {id(p) for p in model_parameters.values()}
        self._tell = tell
        self._count: dict[int, int] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def begins(self, optimizer: Any) -> None:
        """Look at the gradients of an optimizer that is about to step."""
        key = id(optimizer)
        if self._count.get(key, 0) >= IN_A_ROW:
            return
        if any(p.grad is not None for p in _parameters(optimizer)):
            self._count.pop(key, None)
            return
        # A rank of several may hold parts of no elements.
        filled = [p for p in map(_here, _parameters(optimizer)) if p.numel()]
        if filled:
            smallest = min(filled, key=Tensor.numel)
            self._before[key] = smallest, smallest.clone()

    def ends(self, optimizer: Any) -> None:
        """Count the step, if it was empty."""
        parameter, before = self._before.pop(id(optimizer), (None, None))
        if parameter is None or before is None:
            return
        if not torch.equal(parameter, before):
            # Its gradients lie elsewhere: no reason to look again.
            self._count[id(optimizer)] = IN_A_ROW
            return
        self._count[id(optimizer)] = count = self._count.get(id(optimizer), 0) + 1
        if count == IN_A_ROW:
            name = type(optimizer).__name__
            reason = f"{name} stepped {IN_A_ROW} times in a row, and none of its parameters had a gradient: it changes nothing"
            cure = self._cure(optimizer)
            self._tell("empty-steps", {"optimizer": name, "reason": f"{reason}; {cure}"})
            _log.warning("%s; %s", reason, cure)

    def _cure(self, optimizer: Any) -> str:
        if not any(id(p) in self._mine for p in _parameters(optimizer)):
            return "make it of the parameters of the model that is trained: it holds none of them"
        if not any(p.requires_grad for p in _parameters(optimizer)):
            return "all of them are frozen (requires_grad is False)"
        return "call zero_grad() after its step, not between backward() and the step"


def _parameters(optimizer: Any) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _here(parameter: Any) -> Tensor:
    """The part of the parameter that this process holds, which is compared without a word to others."""
    local: Tensor = parameter.to_local() if is_dtensor(parameter) else parameter
    return local.detach()

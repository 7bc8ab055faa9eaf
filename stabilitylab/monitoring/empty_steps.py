"""Notices an optimizer that steps although none of its parameters has a gradient, and so changes nothing.

torch's optimizers skip a parameter whose ``.grad`` is None. Two mistakes make every step an empty one, without an error and with a
loss curve that looks as if the learning rate were too small: ``zero_grad()`` between the backward pass and the step, and an
optimizer built from another model's parameters (those of a copy, or of the model before it was wrapped or converted).

    empty step:  p.grad is None for every p before the step, and since the first such step nothing has changed in the smallest p
                 and in some elements of the largest, bit for bit; of the model's, where the optimizer holds none of them

The second half excludes optimizers that hold gradients elsewhere (Transformer Engine's ``decoupled_grad``) and those that have
stepped already, within the backward pass (LOMO; layerwise GaLore, for which the loop steps a dummy). A healthy step costs one look
at one ``.grad``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stabilitylab.compat import is_dtensor
from stabilitylab.monitoring.optimizers import parameters_of

_log = logging.getLogger("stabilitylab")

# A GAN's optimizers take turns, and a warm-up from a rate of zero moves nothing at first: only many in a row are a mistake.
IN_A_ROW = 20
# Of the largest parameter: in a format of few bits a step may change only the elements near zero.
ELEMENTS = 4096


class _Streak:
    """Empty steps in a row: their number, and some elements with their values before the first."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.steps = 0
        in_order = sorted(parameters, key=Tensor.numel)
        self._watched = [in_order[0], in_order[-1].reshape(-1)[:ELEMENTS]]
        self._before = [one.clone() for one in self._watched]

    @property
    def is_unchanged(self) -> bool:
        return all(map(torch.equal, self._watched, self._before))


class EmptySteps:
    """Counts each optimizer's consecutive empty steps, and reports the twentieth, once.

    Args:
        model_parameters: by name, those of the model that is trained.
        tell: called with the kind and data of an event.
    """

    def __init__(
        self, model_parameters: Mapping[str, Tensor], tell: Callable[[str, Mapping[str, Any]], None]
    ) -> None:
        self._model = model_parameters
        self._mine = {id(p) for p in model_parameters.values()}
        self._tell = tell
        self._streaks: dict[int, _Streak] = {}
        self._done: set[int] = set()

    def begins(self, optimizer: Any) -> None:
        """Look at the gradients of an optimizer that is about to step."""
        key = id(optimizer)
        if key in self._done:
            return
        if any(p.grad is not None for p in parameters_of(optimizer)):
            self._streaks.pop(key, None)
        elif key not in self._streaks:
            held = [p for p in parameters_of(optimizer) if id(p) in self._mine] or self._model.values()
            # A rank of several may hold parts of no elements.
            filled = [p for p in held if _here(p).numel()]
            if parameters := [p for p in filled if p.requires_grad] or filled:
                self._streaks[key] = _Streak([_here(p) for p in parameters])

    def ends(self, optimizer: Any) -> None:
        """Count the step, if it was empty."""
        if (streak := self._streaks.get(id(optimizer))) is None:
            return
        streak.steps += 1
        if not streak.is_unchanged:
            self._finish(optimizer)  # its gradients lie elsewhere
        elif streak.steps == IN_A_ROW:
            self._finish(optimizer)
            name = type(optimizer).__name__
            reason = f"{name} stepped {IN_A_ROW} times in a row, and none of its parameters had a gradient: it changes nothing"
            cure = self._cure(optimizer)
            self._tell("empty-steps", {"optimizer": name, "reason": f"{reason}; {cure}"})
            _log.warning("%s; %s", reason, cure)

    def _finish(self, optimizer: Any) -> None:
        del self._streaks[id(optimizer)]
        self._done.add(id(optimizer))

    def _cure(self, optimizer: Any) -> str:
        if not any(id(p) in self._mine for p in parameters_of(optimizer)):
            return "make it of the parameters of the model that is trained: it holds none of them"
        if not any(p.requires_grad for p in parameters_of(optimizer)):
            return "all of them are frozen (requires_grad is False)"
        return "call zero_grad() after its step, not between backward() and the step"


def _here(parameter: Any) -> Tensor:
    """The part of the parameter that this process holds, which is compared without a word to others."""
    local: Tensor = parameter.to_local() if is_dtensor(parameter) else parameter
    return local.detach()

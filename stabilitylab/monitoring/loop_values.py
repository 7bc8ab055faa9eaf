"""Numbers of a step that the loop need not hand over: seen at the optimizer's step, at the scaler and at clipping.

    learning_rate   of the parameter group with most elements, as the optimizer's step used it: a scheduler sets the next
                    one before the loop ends the step
    group_rate      by group, once the groups' rates differ
    gradient_norm   before clipping, as torch's clipping works it out, where that is over every gradient of the model
    loss_scale      the factor on the loss in the step's backward passes, of torch's scaler
    skipped         1 where the scaler has left the update out

It reads nothing from an accelerator: a number there stays a tensor, and arrives with the step's other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stabilitylab.monitoring.grad_scaler import ScalerState
from stabilitylab.monitoring.optimizers import Optimizers
from stabilitylab.probes.base import Context
from stabilitylab.telemetry import RUN_SITE, Key

Numbers = dict[str | Key, float | Tensor]


class LoopValues:
    """What a step's optimizers, scaler and clipping show.

    Args:
        context: knows the parameters.
        optimizers: have their steps hooked.
        scale: torch's scaler, or none.
    """

    def __init__(self, context: Context, optimizers: Optimizers, scale: ScalerState) -> None:
        self._context, self._optimizers, self._scale = context, optimizers, scale
        # By a group's first parameter: under ZeRO groups are new objects at each step, and step one by one.
        self._groups: dict[int, int] = {}
        self._elements: list[int] = []
        self._differ = False
        self.begin()

    def begin(self) -> None:
        """Begin the next step."""
        self._rates: dict[int, float | Tensor] = {}
        self._norms: list[Tensor] = []
        self._clipped: set[int] = set()
        self._whole = self._unknown = False
        self._skipped: float | Tensor | None = None
        self._loss_scale = self._scale.now()

    def stepping(self, optimizer: Any) -> None:
        """Note the rates of an optimizer that is about to step."""
        for group in optimizer.param_groups:
            if group["params"] and (rate := _rate(group.get("lr"))) is not None:
                self._rates[self._number(group)] = rate

    def decided(self) -> None:
        """Note the rates after the scaler has let the optimizers step, or not: a step left out has rates too."""
        self._skipped = self._scale.skipped()
        for optimizer in self._optimizers.each:
            for group in optimizer.param_groups:
                if group["params"] and self._groups.get(id(group["params"][0])) not in self._rates:
                    self.stepping(optimizer)

    def clipping(self, parameters: Sequence[Tensor], norm: Tensor | None) -> None:
        """Note the norm of gradients that torch is about to clip."""
        known = {id(p) for p in self._context.parameters.values()}
        mine = {id(p) for p in parameters if p.grad is not None} & known
        if (
            not mine or mine & self._clipped
        ):  # another model's, or a second clipping of gradients already clipped
            return
        self._clipped |= mine
        foreign = any(id(p) not in known for p in parameters if p.grad is not None)
        if (
            norm is None
            or foreign
            or self._context.sharded
            or self._context.scattered
            or self._scale.is_in_gradients()
        ):
            self._unknown = True
            return
        self._norms.append(norm.detach())
        self._whole = all(p.grad is None or id(p) in self._clipped for p in self._context.parameters.values())

    def numbers(self) -> Numbers:
        """Name -> number seen in the step."""
        found: Numbers = {}
        if self._rates:
            found["learning_rate"] = self._rates[max(self._rates, key=lambda g: self._elements[g])]
            rates = list(self._rates.values())
            self._differ |= any(isinstance(r, Tensor) or r != rates[0] for r in rates) and len(rates) > 1
            if self._differ:
                found |= {Key("train", RUN_SITE, "group_rate", g): rate for g, rate in self._rates.items()}
        if self._norms and self._whole and not self._unknown:
            if len(self._norms) == 1:
                (norm,) = self._norms
            else:
                first = self._norms[0].device
                norm = torch.stack([n.to(first).double() for n in self._norms]).square().sum().sqrt()
            found["gradient_norm"] = float(norm) if norm.device.type == "cpu" else norm.reshape(())
        if self._loss_scale is not None:
            found["loss_scale"] = self._loss_scale
        if self._skipped is not None:
            found["skipped"] = self._skipped
        return found

    def _number(self, group: Mapping[str, Any]) -> int:
        first = id(group["params"][0])
        if first not in self._groups:
            self._groups[first] = len(self._elements)
            self._elements.append(sum(p.numel() for p in group["params"]))
        return self._groups[first]


def _rate(rate: Any) -> float | Tensor | None:
    if isinstance(rate, Tensor):
        if rate.numel() != 1:
            return None
        # On an accelerator, torch overwrites it with the next one before it is read.
        return float(rate) if rate.device.type == "cpu" else rate.detach().clone().reshape(())
    try:
        return float(rate)
    except (TypeError, ValueError):
        return None

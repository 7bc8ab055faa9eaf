"""Asks torch's GradScaler without waiting for the device.

GradScaler multiplies the loss, and with it every gradient of the backward pass, by a scale that it changes at the end of a step
only. So the scale of a backward pass is the one at the end of the step before. The scaler's own bookkeeping shows whether the
gradients still hold it: ``unscale_`` divides it out, or ``scaler.step`` does.

Where ``scaler.step`` finds non-finite gradients, it skips the optimizer's step, and with it the optimizer's hooks. So ``watch``
replaces ``step`` and ``unscale_`` of this one scaler by methods that also call back when they are done; ``release`` restores the
originals.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from stabilitylab.monitoring.optimizers import parameters_of
from stabilitylab.statistics.buffer import Buffer, Slots


class ScalerState:
    """The factor on the loss.

    Args:
        scaler: None where no scaler scales the loss.
        optimizers: own the gradients.
        buffer: keeps a scale that lives on an accelerator.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler | None, optimizers: Sequence[torch.optim.Optimizer], buffer: Buffer
    ) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._optimizers, self._buffer = optimizers, buffer
        self._told: dict[str, Callable[[], None]] = {}
        self._put: dict[str, _Method] = {}
        self._before: dict[str, Any] = {}
        self._slots: Slots | None = None

    def coming(self) -> float | Slots:
        """The scale of the coming backward pass; ask between two steps."""
        if self._scaler is None:
            return 1.0
        scale = self._scaler._scale
        if scale is None:
            return float(self._scaler._init_scale)
        if scale.device.type == "cpu":
            return float(scale)
        if self._slots is None:
            self._slots = self._buffer.reserve("replicated", 1, scale.device)
        self._buffer.put(self._slots, scale.double())
        return self._slots

    def now(self) -> float | Tensor | None:
        """The same for recording: on an accelerator a copy, since the scaler changes its own in place."""
        if self._scaler is None:
            return None
        scale = self._scaler._scale
        if scale is None:
            return float(self._scaler._init_scale)
        return float(scale) if scale.device.type == "cpu" else scale.detach().clone().reshape(())

    def skipped(self) -> float | Tensor | None:
        """1 where the scaler's latest decisions left a step out; None where it decided nothing."""
        if self._scaler is None:
            return None
        states = self._scaler._per_optimizer_states
        found = [
            inf
            for o in self._optimizers
            if id(o) in states
            for inf in states[id(o)].get("found_inf_per_device", {}).values()
        ]
        if not found:
            return None
        if all(inf.device.type == "cpu" for inf in found):
            return float(max(float(inf) for inf in found) > 0)
        return torch.stack([inf.reshape(()).to(found[0].device) for inf in found]).amax()

    def decided(self) -> list[Any]:
        """The optimizers whose step the scaler has decided on."""
        if self._scaler is None:
            return []
        states = self._scaler._per_optimizer_states
        return [o for o in self._optimizers if id(o) in states and states[id(o)]["stage"] is OptState.STEPPED]

    def is_in_gradients(self) -> bool:
        """Whether some optimizer's gradients still hold the scale."""
        return bool(self._holders())

    def evened(
        self, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], bool]:
        """Gradients that all hold the scale, or none of which does, and whether they do; ask within a step. With several optimizers
        it replaces gradients not yet unscaled by unscaled copies."""
        holders = self._holders()
        # Each of several optimizers is read when it steps, and they must agree.
        if self._scaler is None or not holders or len(self._optimizers) == 1:
            return gradients, bool(holders)
        held = {id(p) for optimizer in holders for p in parameters_of(optimizer)}
        scale = self._scaler._scale
        if scale is None:
            return gradients, True
        even = {
            name: g.detach() / scale.to(g.device) if id(parameters.get(name)) in held else g
            for name, g in gradients.items()
        }
        return even, False

    def _holders(self) -> list[torch.optim.Optimizer]:
        if self._scaler is None:
            return []
        states = self._scaler._per_optimizer_states
        return [o for o in self._optimizers if states[id(o)]["stage"] is OptState.READY]

    def watch(self, *, decided: Callable[[], None], unscaled: Callable[[], None]) -> None:
        """Call ``decided`` whenever the scaler has made, or left out, an optimizer's step, and ``unscaled`` whenever it has divided
        the scale out of gradients."""
        if self._scaler is None:
            return
        self._told = {"step": decided, "unscale_": unscaled}
        for name in self._told:
            self._before[name] = self._scaler.__dict__.get(name)
            own = getattr(self._scaler, name)
            self._put[name] = _Method(self._scaler, name, own, functools.partial(self._tell, name))
            setattr(self._scaler, name, self._put[name])

    def _tell(self, name: str) -> None:
        if name in self._told:
            self._told[name]()

    def release(self) -> None:
        """Leave the scaler as it was. Where another function wraps ours, ours only passes the call on."""
        self._told = {}
        for name, put in self._put.items():
            if self._scaler is not None and self._scaler.__dict__.get(name) is put:
                del self._scaler.__dict__[name]
                if self._before[name] is not None:
                    self._scaler.__dict__[name] = self._before[name]
        self._put = {}


class _Method:
    """A scaler's method, after which ``told`` is called. A copy of the scaler, or one unpickled, has its own instead."""

    def __init__(
        self, scaler: torch.amp.GradScaler, name: str, own: Callable[..., Any], told: Callable[[], None]
    ) -> None:
        self._scaler, self._name, self._own, self._told = scaler, name, own, told

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._own(*args, **kwargs)
        self._told()
        return result

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _own_method, (self._scaler, self._name)


def _own_method(scaler: torch.amp.GradScaler, name: str) -> Callable[..., Any]:
    return MethodType(getattr(type(scaler), name), scaler)

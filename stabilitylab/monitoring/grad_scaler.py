"""torch's GradScaler, asked without waiting for the device.

GradScaler multiplies the loss, and with it every gradient of the backward pass, by a scale that it changes at
the end of a step only. So the scale of a backward pass is the one at the end of the step before, and whether
it is still in the gradients is known from the scaler's own bookkeeping: it is divided out by ``unscale_`` or
inside ``scaler.step``.

Where ``scaler.step`` finds the gradients non-finite it leaves the optimizer's step out, and with it the optimizer's
hooks. So ``watch`` has ``scaler.step`` of this one scaler tell when it is done; ``release`` gives it back its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from stabilitylab.statistics.buffer import Buffer, Slots


class ScalerState:
    """The factor on the loss.

    Args:
        scaler: None where the loss is not scaled by one.
        optimizers: whose gradients they are.
        buffer: where a scale that lives on an accelerator is kept.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler | None, optimizers: Sequence[torch.optim.Optimizer], buffer: Buffer
    ) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._optimizers, self._buffer = optimizers, buffer
        self._told: Callable[[], None] | None = None
        self._put: _Step | None = None
        self._before: Any = None
        self._slots: Slots | None = None

    def coming(self) -> float | Slots:
        """The scale of the backward pass to come; asked between two steps."""
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

    def evened(
        self, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], bool]:
        """Gradients that all hold the scale, or none of them, and whether they do; asked within a step. Where one
        optimizer's are unscaled and another's are not yet, the latter are replaced by unscaled copies."""
        holders = self._holders()
        if self._scaler is None or not holders or len(holders) == len(self._optimizers):
            return gradients, bool(holders)
        held = {id(p) for optimizer in holders for group in optimizer.param_groups for p in group["params"]}
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

    def watch(self, told: Callable[[], None]) -> None:
        """Call ``told`` whenever the scaler has made, or left out, an optimizer's step."""
        if self._scaler is None:
            return
        self._told = told
        self._before = self._scaler.__dict__.get("step")
        self._put = _Step(self._scaler, self._scaler.step, self._decided)
        self._scaler.step = self._put  # type: ignore[method-assign]

    def _decided(self) -> None:
        if self._told is not None:
            self._told()

    def release(self) -> None:
        """Leave the scaler as it was. Where somebody else has put a function over ours, ours only passes on."""
        self._told = None
        if (
            self._scaler is not None
            and self._put is not None
            and self._scaler.__dict__.get("step") is self._put
        ):
            del self._scaler.__dict__["step"]
            if self._before is not None:
                self._scaler.__dict__["step"] = self._before


class _Step:
    """A scaler's ``step``, after which ``told`` is called. A copy of the scaler, or one unpickled, has its own instead."""

    def __init__(
        self, scaler: torch.amp.GradScaler, own: Callable[..., Any], told: Callable[[], None]
    ) -> None:
        self._scaler, self._own, self._told = scaler, own, told

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._own(*args, **kwargs)
        self._told()
        return result

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _own_step, (self._scaler,)


def _own_step(scaler: torch.amp.GradScaler) -> Callable[..., Any]:
    return MethodType(type(scaler).step, scaler)

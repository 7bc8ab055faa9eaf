"""torch's GradScaler, asked without waiting for the device.

GradScaler multiplies the loss, and with it every gradient of the backward pass, by a scale that it changes at
the end of a step only. So the scale of a backward pass is the one at the end of the step before, and whether
it is still in the gradients is known from the scaler's own bookkeeping: it is divided out by ``unscale_`` or
inside ``scaler.step``.
"""

from __future__ import annotations

import torch
from torch.amp.grad_scaler import OptState

from stabilitylab.statistics.buffer import Buffer, Slots


class LossScale:
    """The factor on the loss.

    Args:
        scaler: None where the loss is not scaled by one.
        optimizer: whose gradients they are.
        buffer: where a scale that lives on an accelerator is kept.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler | None, optimizer: torch.optim.Optimizer | None, buffer: Buffer
    ) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._optimizer, self._buffer = optimizer, buffer
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

    def in_gradients(self) -> bool:
        """Whether the scale has not been divided out of the gradients yet; asked within a step."""
        if self._scaler is None or self._optimizer is None:
            return False
        return bool(self._scaler._per_optimizer_states[id(self._optimizer)]["stage"] is OptState.READY)

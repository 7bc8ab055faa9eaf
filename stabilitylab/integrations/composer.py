"""The monitor in Composer's Trainer, and in any loop with its events.

    from stabilitylab.integrations.composer import MonitorCallback

    Trainer(..., callbacks=[MonitorCallback(out="runs/mine", every=10)])

Composer's loop is: ``fit_start``; for each batch ``before_loss``, ``after_loss``, ``after_backward`` for each micro-batch, then
``after_train_batch``, the optimizer's step and ``batch_end``. Clipping is an algorithm that runs before the callbacks and uses
torch's clipping, which the monitor notices by itself. The step's number is ``state.timestamp.batch``, which has counted up when a
batch ends, less 1; the loss is this rank's mean over the micro-batches.

The callback uses only the names of the events and of the state's fields, so any loop with the same names works: through
``callback.run_event(event, state, logger)`` or a method per event. Source: composer 0.32, ``core/event.py``,
``trainer/trainer.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stabilitylab.monitoring.monitor import Monitor

try:
    from composer.core import Callback
except Exception:  # not installed, or not with this torch: only its events are needed
    Callback = object


class MonitorCallback(Callback):  # type: ignore[misc]
    """Watches the fitted model.

    Args:
        options: those of ``Monitor``, without model and optimizer.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = options
        self._losses: list[Tensor] = []
        self.monitor: Monitor | None = None

    if Callback is object:

        def run_event(self, event: Any, state: Any, logger: Any) -> None:
            """Call the method that has the event's name."""
            name = str(getattr(event, "value", event))
            if (method := getattr(self, name, None)) is not None:
                method(state, logger)

    def fit_start(self, state: Any, logger: Any) -> None:
        """Attach."""
        optimizers = state.optimizers
        given = list(optimizers) if isinstance(optimizers, list | tuple) else optimizers
        self._losses.clear()
        self.monitor = Monitor(state.model, given, scaler=getattr(state, "scaler", None), **self._options)
        self.monitor.start_step(_batches(state))

    def after_loss(self, state: Any, logger: Any) -> None:
        """Add a micro-batch's loss."""
        loss = state.loss
        if isinstance(loss, dict):
            loss = loss.get("total", None) if "total" in loss else sum(loss.values())
        if isinstance(loss, list | tuple):
            loss = sum(loss)
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())

    def batch_end(self, state: Any, logger: Any) -> None:
        """Pass the finished update to the monitor."""
        if self.monitor is not None:
            loss = torch.stack(self._losses).mean() if self._losses else None
            self.monitor.step(_batches(state) - 1, loss=loss)
        self._losses.clear()

    def fit_end(self, state: Any, logger: Any) -> None:
        """Detach and write the rest."""
        self._close()

    def close(self, state: Any, logger: Any) -> None:
        """The same when the Trainer closes, perhaps after an error."""
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            monitor, self.monitor = self.monitor, None
            monitor.close()


def _batches(state: Any) -> int:
    batch = state.timestamp.batch
    return int(getattr(batch, "value", batch))

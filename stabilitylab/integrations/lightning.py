"""The monitor in Lightning's Trainer.

    from stabilitylab.integrations.lightning import MonitorCallback

    trainer = Trainer(max_steps=1000, callbacks=[MonitorCallback(out="runs/mine", every=10)])
    trainer.fit(module, data)

The step's number is the Trainer's ``global_step`` before it counts up. The callback reads gradients in
``on_before_optimizer_step``, which Lightning calls after unscaling and before clipping. The loss is that of ``training_step``,
averaged over the micro-batches of a step; the learning rate is the one that the step used.

Limits: with several optimizers Lightning counts each one's steps, and the monitor uses Lightning's numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stabilitylab.integrations import installed_by
from stabilitylab.model_structure import bare, named_parameters
from stabilitylab.monitoring.monitor import Monitor

with installed_by("stabilitylab[hf]"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class MonitorCallback(Callback):  # type: ignore[misc]
    """Watches the fitted module.

    Args:
        options: those of ``Monitor``, without model, optimizer and scaler.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.monitor: Monitor | None = None
        self._losses: list[Tensor] = []
        self._next = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.monitor = Monitor(pl_module, trainer.optimizers, scaler=scaler, **self._options)
        self._names = {id(p): name for name, p in named_parameters(bare(pl_module)).items()}
        self._next = trainer.global_step
        self.monitor.start_step(self._next)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Read gradients, unscaled and not yet clipped."""
        if self.monitor is not None:
            its = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            named = {self._names[id(p)]: p.grad for p in its if id(p) in self._names}
            self.monitor.gradients_ready(gradients=named)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a micro-batch, and after the last one of a step, the step."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())
        if self.monitor is None or trainer.global_step == self._next:
            return
        mean = None
        if self._losses:
            losses = torch.stack(self._losses)
            # Automatic optimization has divided each by the number of micro-batches already.
            mean = losses.sum() if pl_module.automatic_optimization else losses.mean()
        self.monitor.step(self._next, loss=mean)
        self._losses.clear()
        self._next = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach and write the rest."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what the monitor saw, when an error ends the fit."""
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None

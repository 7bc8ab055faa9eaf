"""The monitor in OLMo-core's Trainer.

    from stabilitylab.integrations.olmo_core import MonitorCallback

    config = TrainerConfig(...).with_callback("stabilitylab", MonitorCallback(out="runs/mine", every=10))

The callback reads gradients in ``pre_optim_step``, before the train module clips them. The step's number is the Trainer's
``global_step`` (which counts from 1) less 1, the loss this rank's cross entropy as the train module records it (``train/CE loss``).
The callback records a step that ``SkipStepOptimizer`` skipped as skipped.

Limits: no pipeline, whose train module has several models and optimizers, one per stage.

Source: OLMo-core 3.0, ``train/trainer.py``, ``train/callbacks/callback.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stabilitylab.errors import InputError
from stabilitylab.integrations import installed_by
from stabilitylab.monitoring.monitor import Monitor

with installed_by("ai2-olmo-core"):
    from olmo_core.train.callbacks import Callback
    from olmo_core.train.common import TRAIN_CE_LOSS_METRIC


@dataclass
class MonitorCallback(Callback):  # type: ignore[misc]
    """Watches the train module's model.

    Args:
        out: the run folder.
        every: measure every n-th step.
        options: further arguments of ``Monitor``, without model and optimizer.
    """

    out: str | None = None
    every: int = 10
    options: dict[str, Any] = field(default_factory=dict)

    def pre_train(self) -> None:
        """Attach.

        Raises:
            InputError: the train module has a pipeline.
        """
        module = self.trainer.train_module
        if not hasattr(module, "optim"):
            raise InputError(
                f"a {type(module).__name__} is not watched: a pipeline's ranks hold other layers each"
            )
        options = {"out": self.out, "every": self.every, **self.options}
        self._monitor: Monitor | None = Monitor(module.model, module.optim, **options)
        self._monitor.start_step(self.trainer.global_step)

    def pre_optim_step(self) -> None:
        """Read gradients, reduced and not yet clipped."""
        if (monitor := self._open()) is not None:
            monitor.gradients_ready()

    def post_step(self) -> None:
        """Pass the finished update to the monitor."""
        if (monitor := self._open()) is not None:
            loss = self.trainer.get_metric(TRAIN_CE_LOSS_METRIC)
            skipped = getattr(self.trainer.train_module.optim, "step_skipped", None)
            monitor.step(self.trainer.global_step - 1, loss=loss, skipped=skipped)

    def post_train(self) -> None:
        """Detach and write the rest."""
        self.close()

    def on_error(self, exc: BaseException) -> None:
        """Write what the monitor saw, when an error ends training."""
        self.close()

    def close(self) -> None:
        """Detach."""
        if (monitor := self._open()) is not None:
            self._monitor = None
            monitor.close()

    def _open(self) -> Monitor | None:
        return getattr(self, "_monitor", None)

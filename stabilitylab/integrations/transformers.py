"""The monitor in HuggingFace's Trainer.

    from stabilitylab.integrations.transformers import MonitorCallback

    trainer = Trainer(model, args, train_dataset=data, callbacks=[MonitorCallback(out="runs/mine", every=10)])
    trainer.train()

The step's number is the Trainer's ``global_step`` before it counts up, so steps begin at 0 and a resumed run goes on where it
stopped. The callback takes the loss of every step from the model's own output, and combines micro-batches as the Trainer does: it
adds them where the Trainer divides by the number of items in the whole batch, else averages them.

The Trainer has no event between the backward pass and clipping; the monitor notices torch's clipping itself. Where the Trainer
clips by other means (FSDP, DeepSpeed), the monitor reads clipped gradients, in the optimizer's step. The learning rate is the one
that the step used.

The Trainer does not report an interruption (Ctrl-C in a notebook, out of memory): the monitor writes the rest at the next call of
``train``, or when the process ends. A second ``train`` that resumes from a checkpoint goes on in the same folder, and supersedes
(``rewind``) what the first recorded after the checkpoint. One that begins at step 0 is another run: where the folder holds one
already, the monitor writes beside it, into ``mine-2``, and says so.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.integrations import installed_by
from stabilitylab.monitoring.monitor import Monitor
from stabilitylab.runs.folder import RunFolder

with installed_by("stabilitylab[hf]"):
    from transformers import TrainerCallback

_log = logging.getLogger("stabilitylab")


class MonitorCallback(TrainerCallback):  # type: ignore[misc]
    """Watches the Trainer's model.

    Args:
        options: those of ``Monitor``, without model, optimizer and scaler.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.monitor: Monitor | None = None
        self._losses: list[tuple[Tensor, bool]] = []
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close what an interrupted training left open, then attach."""
        self._close()
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        options, step = dict(self._options), state.global_step
        goes_on = False
        if out := options.get("out"):
            goes_on = _holds_a_run(out)
            if goes_on and not step and not isinstance(out, RunFolder):
                options["out"], goes_on = _beside(out), False
                if state.is_world_process_zero:
                    _log.warning(
                        "%s holds a run already: training that begins at step 0 is written into %s",
                        os.fspath(out),
                        options["out"],
                    )
        self.monitor = Monitor(model, optimizer, scaler=getattr(optimizer, "scaler", None), **options)
        if goes_on:
            self.monitor.rewind(step, reason="training was resumed")
        else:
            self.monitor.start_step(step)
        self._handle = model.register_forward_hook(self._take_loss, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the finished update to the monitor."""
        if self.monitor is None:
            return
        loss = None
        if self._losses:
            losses = torch.stack([loss for loss, _ in self._losses])
            loss = losses.sum() if self._losses[0][1] else losses.mean()
        self.monitor.step(state.global_step - 1, loss=loss)
        self._losses.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach and write the rest."""
        self._close()

    def _close(self) -> None:
        if self.monitor is None:
            return
        self._handle.remove()
        self._losses.clear()
        monitor, self.monitor = self.monitor, None
        monitor.close()

    def _take_loss(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and module.training:
            self._losses.append((loss.detach(), kwargs.get("num_items_in_batch") is not None))


def _holds_a_run(out: str | os.PathLike[str] | RunFolder) -> bool:
    run = out if isinstance(out, RunFolder) else RunFolder(out)
    return run.events.is_file() or any(run.telemetry.glob("*.parquet"))


def _beside(out: str | os.PathLike[str]) -> Path:
    """The first of out-2, out-3, ... that holds no run."""
    path, number = Path(out), 2
    while _holds_a_run(beside := path.with_name(f"{path.name}-{number}")):
        number += 1
    return beside

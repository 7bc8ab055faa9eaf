"""The monitor in torchtitan's Trainer.

    from torchtitan.config import ConfigManager
    from stabilitylab.integrations.torchtitan import watch

    trainer = ConfigManager().parse_args().build()
    with watch(trainer, out="runs/mine", every=10):
        trainer.train()

For as long as the monitor is open, ``watch`` replaces ``trainer.train_step`` and ``trainer.forward_backward_step`` by methods that
tell it of the last micro-batch's gradients, before clipping, and of the step. The step's number is the trainer's ``step`` (which
counts from 1) less 1. The loss is this rank's sum over the step's micro-batches, on the scale of the global mean (torchtitan
divides by the tokens of all ranks). All ranks must call ``watch``; rank 0 writes. The monitor merges FSDP2's sharded gradients
(DTensor) without gathering them.

Limits: no pipeline, whose ranks hold different layers and, except for the last, no loss; no CUDA graphs, which 0.3 makes of every
step by default, since a replayed graph calls no hook. The monitor does not see its language models' attention, flex_attention or
varlen. Source: torchtitan 0.3, ``trainer.py``, ``distributed/cudagraph.py``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.monitoring.monitor import Monitor


def watch(trainer: Any, **options: Any) -> Monitor:
    """Attach a monitor to a ``torchtitan.trainer.Trainer``, for as long as the monitor is open.

    Args:
        trainer: made from its configuration, not yet trained.
        options: those of ``Monitor``, without model and optimizer.

    Raises:
        InputError: ``trainer`` is no torchtitan Trainer, or has a pipeline, or replays its steps.
    """
    if not all(
        hasattr(trainer, name)
        for name in ("model_parts", "optimizers", "train_step", "forward_backward_step")
    ):
        raise InputError(f"trainer is a {type(trainer).__name__}: give a torchtitan Trainer")
    if trainer.parallel_dims.pp_enabled:
        raise InputError("torchtitan with a pipeline is not watched: its ranks hold other layers each")
    # The trainer's own method, or a function around it: only on NVIDIA's GPUs. Before 0.3 the attribute does not exist.
    if hasattr(trainer, "fwd_bwd_fn") and not inspect.ismethod(trainer.fwd_bwd_fn):
        raise InputError(
            "torchtitan replays each step as a CUDA graph, in which nothing can be watched: give it --training.disable_cuda_graphs"
        )
    return _TrainerMonitor(trainer, options)


class _TrainerMonitor(Monitor):
    """A monitor driven by the trainer's own calls."""

    def __init__(self, trainer: Any, options: dict[str, Any]) -> None:
        self._trainer = trainer
        self._losses: list[Tensor] = []
        super().__init__(trainer.model_parts[0], list(trainer.optimizers.optimizers), **options)
        self._train_step, self._forward_backward = trainer.train_step, trainer.forward_backward_step
        trainer.train_step, trainer.forward_backward_step = self._step, self._micro_batch
        self.start_step(int(trainer.step))

    def _micro_batch(self, **batch: Any) -> Any:
        loss = self._forward_backward(**batch)
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach().clone())
        if len(self._losses) == self._trainer.gradient_accumulation_steps:
            self.gradients_ready()
        return loss

    def _step(self, data: Any) -> Any:
        self._losses.clear()
        number = int(self._trainer.step) - 1
        self.start_step(number)
        done = self._train_step(data)
        loss = torch.stack(self._losses).sum() * self._ranks_of_loss() if self._losses else None
        self.step(number, loss=loss)
        return done

    def _ranks_of_loss(self) -> int:
        dims = self._trainer.parallel_dims
        return int(dims.get_mesh("batch").size()) if dims.dp_enabled else 1

    def close(self) -> None:
        """Restore the trainer's own methods, and write the rest."""
        trainer = self._trainer
        if trainer.__dict__.get("train_step") == self._step:
            del trainer.train_step, trainer.forward_backward_step
        super().close()

"""GLM's trainer as a loop that ``stabilitylab.attribution`` forks: one update at a time, from any state, with any batch.

A fork's update is the trainer's own (``Trainer.advance``), so a control repeats the run to the last bit. This module adds what
interventions need: the trained tensors are the fp32 masters, rounded into the model when an intervention writes to them; the
optimizer's step computes the clipping factor, from norms recomputed when an intervention has changed a gradient.

Limits: the local engine only. A fork does not repeat a responder's decisions, so its first decision ends the comparison with the
original.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from glm.data.batch import NO_TARGET, Batch
from glm.data.loader import Loader
from glm.data.shards import TokenData, open_data
from glm.train.checkpoint import Checkpoint
from glm.train.config import TrainConfig
from glm.train.engine import LocalEngine
from glm.train.events import Callback, StepInfo
from glm.train.optimizer import MixedPrecisionAdamW
from glm.train.replay_forks import config_of, trainer_of
from stabilitylab.runs import load_run
from stabilitylab.spikes import ResponderConfig
from stabilitylab.telemetry import Event


class ForkLoop:
    """See ``stabilitylab.attribution.loop``.

    Args:
        config: the run's, its vocabulary filled in.
        data: the training data.
        device: where the model lives.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TokenData,
        *,
        device: torch.device | str = "cpu",
        callbacks: Sequence[Callback] = (),
    ) -> None:
        quiet = dataclasses.replace(config.checkpoint, every=0, ring=0, asynchronous=False)
        config = dataclasses.replace(config, checkpoint=quiet, responder=ResponderConfig())
        self._last = _Last()
        self._trainer = trainer_of(config, data, (*callbacks, self._last), device=device)
        assert isinstance(self._trainer.engine, LocalEngine)
        self._engine = self._trainer.engine
        self.model = self._engine.model
        self.optimizer: MixedPrecisionAdamW = self._engine.optimizer
        self.parameters: Mapping[str, Tensor] = self._engine.tensors()[0]
        # The trainer's next batch.
        self._next = 0

    @classmethod
    def of_run(cls, run: Path, data: Path, device: torch.device | str = "cpu") -> ForkLoop:
        """The loop of a run of ``glm train``."""
        return cls(config_of(load_run(run)), open_data(data), device=device)

    def state_dict(self) -> Checkpoint:
        return self._trainer.state()

    def load_state_dict(self, state: Checkpoint) -> None:
        self._trainer.restore(state)
        self._next = state.step

    def train_step(self, index: int) -> Mapping[str, float]:
        trainer = self._trainer
        if index != self._next:
            trainer.samples += (index - self._next) * trainer.config.batch.rows_at(trainer.samples)
        self._next = index + 1
        trainer.advance(trainer.step + 1)
        info = self._last.info
        assert info is not None
        return {"loss": info.loss, "gradient_norm": info.gradient_norm, "loss_scale": info.loss_scale}

    def train_step_without(self, index: int, rows: Sequence[int]) -> Mapping[str, float]:
        whole = self._trainer.loader
        self._trainer.loader = _Without(whole, rows)
        try:
            return self.train_step(index)
        finally:
            self._trainer.loader = whole

    def row_losses(self, index: int) -> list[tuple[float, float]]:
        trainer, engine = self._trainer, self._engine
        rows = trainer.config.batch.rows_at(trainer.samples)
        first = trainer.samples + (index - self._next) * rows
        found = []
        for sample in range(first, first + rows):
            batch = trainer.loader.samples(range(sample, sample + 1))
            if not int((batch.targets_BT >= 0).sum()):
                found.append((0.0, 0.0))
                continue
            loss = engine.forward_backward(batch, trainer.step)
            found.append((loss, engine.gradients().global_norm))
            engine.discard()
        return found

    # Interventions call these.

    def weights_changed(self) -> None:
        self.optimizer.publish()

    def gradients_changed(self) -> None:
        self.optimizer.measure_again()

    def gradient_factor(self) -> float:
        return self.optimizer.coming_factor()

    def settings_changed(self) -> None:
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        self.optimizer.config = dataclasses.replace(
            self.optimizer.config, beta1=beta1, beta2=beta2, epsilon=group["eps"]
        )


class _Last(Callback):
    """The last step's numbers."""

    info: StepInfo | None = None

    def step_end(self, info: StepInfo) -> Sequence[Event]:
        self.info = info
        return ()


class _Without(Loader):
    """A loader whose batches have no targets in some rows."""

    def __init__(self, whole: Loader, rows: Sequence[int]) -> None:
        self.__dict__.update(whole.__dict__)
        self._left_out = list(rows)

    def samples(self, numbers: Sequence[int]) -> Batch:
        batch = super().samples(numbers)
        targets = batch.targets_BT.clone()
        targets[self._left_out] = NO_TARGET
        return dataclasses.replace(batch, targets_BT=targets)

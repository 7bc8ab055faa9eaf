"""An engine turns a batch into an update: its interface, and the local engine.

The loop knows an ``Engine`` and nothing of how it computes: the local one is plain torch in one process; that of ``glm.parallel``
is tensor-, pipeline- and data-parallel. An update is

    loss_i  = sum of the micro-batch's target losses / targets of the whole batch      so that the mean is over targets,
    g       = sum_i d(s * loss_i)/dw / s                                               however the rows were split
    w      <- AdamW(clip(g))         unless g is not finite: then skip the update and tell the loss scaler

Dropout masks are a function of (seed, step, row): a resumed or replayed step draws the same ones, in any engine.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glm.data.batch import Batch
from glm.distributed.process_group import ProcessGroup, SingleProcess
from glm.errors import InputError
from glm.model.dropout import row_keys
from glm.model.experts import expert_loads
from glm.model.passes import unnoted
from glm.model.scaling import rate_factors
from glm.model.transformer import Transformer
from glm.model.weight_followers import follow_all, has_followers
from glm.precision import LossScaler, PrecisionPolicy
from glm.train import checkpoint as checkpoints
from glm.train.async_checkpoint import CheckpointWriter
from glm.train.checkpoint import Checkpoint
from glm.train.config import TrainConfig
from glm.train.emulation import Emulation
from glm.train.gradient_summary import GradientSummary
from glm.train.optimizer import MixedPrecisionAdamW
from glm.train.qk_clip import clip_queries_and_keys, forget_scores
from glm.train.update_rules.parameter_groups import role_of
from stabilitylab.compat import allow_graphs


@dataclass(frozen=True, slots=True)
class Whole:
    """The whole update of which a process computes some rows: all its rows, and their targets."""

    rows: int
    targets: int


class Engine(Protocol):
    """A model, its optimizer, and the four parts of a step."""

    @property
    def model(self) -> nn.Module:
        """The module to which the monitor attaches."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that updates it."""

    @property
    def processes(self) -> ProcessGroup:
        """The processes that this engine spans. All call the same methods in the same order."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""

    @property
    def sharded(self) -> Sequence[str]:
        """Globs of modules of which this process has only a part; see ``stabilitylab.Monitor``."""

    @property
    def scattered(self) -> Sequence[str]:
        """Globs of parameters of which ``tensors`` gives only a part."""

    @property
    def shard(self) -> int:
        """The number of this process's part of the modules."""

    def repeats(self, parameter: str) -> bool:
        """Whether another process accumulates the very same gradient of a parameter, and counts it for both."""

    @property
    def loss_scale(self) -> float:
        """The factor on the loss in the next backward pass."""

    def own_rows(self, rows: int) -> range:
        """The rows of an update that this process computes; it need not build the others."""

    def whole(self, batch: Batch, rows: int) -> Whole:
        """The whole update of ``rows`` rows, of which ``batch`` holds this process's own. All processes call this together."""

    def forward_backward(self, batch: Batch, step: int, whole: Whole | None = None) -> float:
        """Accumulate the gradient of the update's mean target loss; returns that loss in nats, without auxiliary terms (z-loss),
        which are in the gradient, and in ``levers`` under their own names.

        Args:
            batch: this process's own rows; all rows, if ``whole`` is None.
            step: number of the update.
            whole: the update of which it is part.

        Raises:
            InputError: no row has a target.
        """

    def gradients(self) -> GradientSummary:
        """Norms of the accumulated gradient: reduced over ranks, unscaled, not clipped."""

    def update(self, learning_rate: float, *, clip: float) -> bool:
        """Clip and apply the gradient, then forget it. False: it skipped the update (gradient not finite, or a guard)."""

    def levers(self) -> Mapping[str, float]:
        """What guards and the like did in the last update, and the means of the loss's auxiliary terms, by telemetry name."""

    def on_trial(self) -> AbstractContextManager[None]:
        """Passes within leave nothing that an update reads, except gradients."""

    def discard(self) -> None:
        """Forget the accumulated gradient without an update."""

    def set_embedding_gradient_shrink(self, alpha: float) -> None:
        """EGS's alpha from the next forward pass on; 1 is off."""

    def withhold(self, parameters: Set[str]) -> None:
        """From the next update on leave these parameters, and their moments, as they are. Empty: update all."""

    def renew_second_moments(self, parameters: Set[str]) -> None:
        """Let the next update forget the past of these parameters' second moments."""

    def tensors(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """The fp32 weights and the moments, by name; with several processes, those that this one keeps. They are live: copy what
        must outlast the next update.
        """

    def load_tensors(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Load weights and moments as ``tensors`` returned them. Raises InputError if they belong to another model."""

    def begin_save(self, folder: Path, checkpoint: Checkpoint, *, background: bool) -> CheckpointWriter:
        """Begin to write a checkpoint whose tensors are as ``tensors`` gives them: from a copy in another thread, or at once.

        Raises OSError, on every process, when the disk is full.
        """

    def save(self, folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
        """Write a checkpoint at once, then remove all but the newest ``keep``. Raises OSError as ``begin_save``."""

    def load_newest(self, folder: Path) -> tuple[Checkpoint, list[str]]:
        """The newest whole checkpoint, its tensors as ``load_tensors`` takes them, and one line about each newer, damaged one.
        Raises InputError if there is none.
        """

    def state_dict(self) -> dict[str, Any]:
        """The rest of the engine's state, as JSON can hold it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


class Updates:
    """What every engine does with its optimizer and loss scaler: update with them, and keep their state."""

    model: Transformer
    optimizer: MixedPrecisionAdamW
    scaler: LossScaler | None
    auxiliary: Mapping[str, float] = MappingProxyType({})

    @property
    def loss_scale(self) -> float:
        return self.scaler.scale if self.scaler is not None else 1.0

    def gradients(self) -> GradientSummary:
        return self.optimizer.gradients(self.loss_scale)

    def update(self, learning_rate: float, *, clip: float) -> bool:
        applied = self.optimizer.step_with(learning_rate, clip=clip)
        if not applied:
            forget_scores(self.model)
        if self.scaler is not None:
            self.scaler.update(overflow=self.optimizer.overflowed)
        self.optimizer.zero_grad()
        return applied

    def levers(self) -> Mapping[str, float]:
        guarded = {name: float(value) for name, value in self.optimizer.guards.told.items()}
        return {**guarded, **self.auxiliary}

    @contextmanager
    def on_trial(self) -> Iterator[None]:
        before = self.optimizer.loss, self.auxiliary
        try:
            with unnoted(self.model):
                yield
        finally:
            self.optimizer.loss, self.auxiliary = before

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def withhold(self, parameters: Set[str]) -> None:
        self.optimizer.withheld = frozenset(parameters)

    def renew_second_moments(self, parameters: Set[str]) -> None:
        self.optimizer.renewed = frozenset(parameters)

    @abstractmethod
    def begin_save(self, folder: Path, checkpoint: Checkpoint, *, background: bool) -> CheckpointWriter:
        """See ``Engine``."""

    def save(self, folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
        return self.begin_save(folder, checkpoint, background=False).publish(keep=keep)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"optimizer": self.optimizer.counters()}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_counters(state["optimizer"])
        # A state of another precision has no scaler; a replay in fp16 begins with a fresh one.
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


class LocalEngine(Updates):
    """Plain torch on one device.

    Args:
        config: the run's configuration, its vocabulary filled in.
        device: where the model lives.
    """

    sharded: Sequence[str] = ()
    scattered: Sequence[str] = ()
    shard = 0

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.processes: ProcessGroup = SingleProcess()
        self.seed = config.seed
        self._drops = config.model.dropout > 0
        self.micro_rows = config.batch.micro
        self.policy = PrecisionPolicy(precision=config.precision)
        # The masters take the initial weights in fp32: every precision begins from the same point.
        self.model = Transformer(config.model, config.seed).to(self.device)
        self.optimizer = MixedPrecisionAdamW(
            self.model,
            config.optimizer,
            self.policy,
            peak=config.schedule.peak,
            factors=rate_factors_of(self.model),
            kept=config.bf16_weights,
            seed=config.seed,
        )
        self._emulation = Emulation(self.model, config.emulate, config.seed) if config.emulate.is_on else None
        if config.model.attention.qk_clip:
            threshold = config.model.attention.qk_clip
            self.optimizer.after_update = lambda: clip_queries_and_keys(
                self.model, self.optimizer.masters(), threshold
            )
        experts = config.model.feed_forward.experts.count
        self._auxiliary = "auxiliary_loss" if experts else "z_loss" if config.model.z_loss else ""
        self._has_followers = has_followers(config.model)
        self.scaler = LossScaler(config.loss_scale) if self.policy.scales_loss else None
        if config.compile:
            self._compile()

    def _compile(self) -> None:
        # Each layer scales its scores by its own constant, so each layer may be its own graph, in training and in evaluation.
        allow_graphs(2 * len(self.model.layers) + 2)
        for layer in self.model.layers:
            layer.compile()

    def repeats(self, parameter: str) -> bool:
        return False

    def own_rows(self, rows: int) -> range:
        return range(rows)

    def whole(self, batch: Batch, rows: int) -> Whole:
        return Whole(rows, count_targets(batch))

    def forward_backward(self, batch: Batch, step: int, whole: Whole | None = None) -> float:
        targets = whole.targets if whole is not None else count_targets(batch)
        check_targets(targets, step)
        # These stay on the device until all micro-batches are queued: reading one would wait for its backward pass.
        sums = []
        for first in range(0, batch.tokens_BT.shape[0], self.micro_rows):
            rows = slice(first, first + self.micro_rows)
            tokens, targets_BT, positions, segments, context = (
                brought(part, self.device) for part in _model_inputs(batch, rows)
            )
            keys_B = row_keys(self.seed, step, range(first, first + len(tokens))) if self._drops else None
            if self._emulation is not None:
                self._emulation.begin(step, first)
            loss_sum, z_sum, _ = self.model.loss_parts(
                tokens, targets_BT, positions, segments, context, keys_B
            )
            (loss_sum * (self.loss_scale / targets)).backward()  # type: ignore[no-untyped-call]
            self.optimizer.accumulate()
            sums.append(torch.stack((loss_sum.detach(), z_sum)).double())
        total = of_z = 0.0
        for loss_of_rows, z_of_rows in torch.stack(sums).tolist():
            total += loss_of_rows
            of_z += z_of_rows if self._auxiliary else 0.0
        if self._auxiliary:
            self.auxiliary = {self._auxiliary: of_z / targets}
        self.optimizer.loss = (total - of_z) / targets
        return self.optimizer.loss

    def update(self, learning_rate: float, *, clip: float) -> bool:
        loads = expert_loads(self.model) if self._has_followers else {}
        applied = super().update(learning_rate, clip=clip)
        if self._has_followers:
            follow_all(self.model, applied=applied)
            self.optimizer.guards.told |= loads
        return applied

    def set_embedding_gradient_shrink(self, alpha: float) -> None:
        self.model.embedding.gradient_shrink = alpha

    def tensors(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        # The model's buffers are part of it.
        return {**self.optimizer.masters(), **dict(self.model.named_buffers())}, self.optimizer.moments()

    def load_tensors(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        own_weights, own_moments = self.tensors()
        for own, given, what in ((own_weights, model, "weights"), (own_moments, optimizer, "moments")):
            if odd := sorted(own.keys() ^ given.keys()):
                raise InputError(
                    f"the checkpoint's {what} are of another model: {odd[0]} is in only one of the two"
                )
            for name, tensor in own.items():
                if tensor.shape != given[name].shape:
                    raise InputError(
                        f"the checkpoint is of another model: {name} is {list(given[name].shape)}, "
                        f"this model's is {list(tensor.shape)}"
                    )
        self.optimizer.load(masters=model, moments=optimizer)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(model[name])

    def begin_save(self, folder: Path, checkpoint: Checkpoint, *, background: bool) -> CheckpointWriter:
        files = {"model": checkpoint.model, "optimizer": checkpoint.optimizer}
        on_host = {
            f"{kind}.safetensors": {
                name: tensor.detach().to("cpu", copy=background) for name, tensor in tensors.items()
            }
            for kind, tensors in files.items()
        }
        return CheckpointWriter(folder, checkpoint, on_host, self.processes, background=background)

    def load_newest(self, folder: Path) -> tuple[Checkpoint, list[str]]:
        return checkpoints.load_newest(folder)


def brought(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, without waiting for the device's queued work."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def rate_factors_of(model: Transformer) -> dict[str, float]:
    """The model scaling's factors on single parameters' learning rates."""
    matrices = [name for name, one in model.named_parameters() if role_of(name, one.dim()) == "hidden"]
    return rate_factors(model.config, matrices)


class Targets(Protocol):
    """The part of a batch that says how many targets it has."""

    @property
    def targets_BT(self) -> Tensor:  # noqa: N802
        """[B, T]; below 0: none."""


def count_targets(batch: Targets) -> int:
    """Positions with a target."""
    return int((batch.targets_BT >= 0).sum())


def check_targets(targets: int, step: int) -> None:
    """Raises InputError where a batch has no target, and so no mean."""
    if targets == 0:
        raise InputError(f"the batch of step {step} has no targets: its rows are too short for the objective")


def _model_inputs(batch: Batch, rows: slice) -> tuple[Tensor, ...]:
    """The arguments of ``Transformer.loss`` for some rows of the batch."""
    return (
        batch.tokens_BT[rows],
        batch.targets_BT[rows],
        batch.positions[rows],
        batch.segments_BT[rows],
        batch.context_BT[rows],
    )

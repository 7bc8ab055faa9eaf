"""The training loop's events, and the callbacks that hear them.

This is the loop, and a test holds ``glm/train/loop.py`` to it:

    train_start
    for step:
        step_start
        for micro-batch: forward, backward
        gradients_ready
        clip, optimizer, schedule
        step_end
        responder
    train_end

A ``Callback`` observes and never changes training: a watched run equals an unwatched one bit for bit. It may return what it noticed
(``step_end`` returns events); the responder acts on that, and each of its decisions is an event on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stabilitylab.telemetry import Event

if TYPE_CHECKING:
    from glm.train.gradient_summary import GradientSummary
    from glm.train.loop import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """One optimizer update.

    Attributes:
        step: its number, from 0.
        loss: mean over the step's targets, nats, without auxiliary terms.
        gradient_norm: global L2 norm, unscaled, before clipping; inf or nan if it overflowed.
        learning_rate: the rate of this update.
        tokens: input tokens of this step, with padding.
        targets: tokens that the loss counted.
        loss_scale: the factor on the loss in this step's backward pass; 1 without fp16.
        skipped: the engine skipped the update, since its gradient was not finite or a guard rejected it.
        seconds: wall time of the step.
        embedding_gradient_shrink: EGS's alpha in this step; 1 = off.
        data_seconds: the part of ``seconds`` spent waiting for the batch.
        first_sample: number of the step's first row, from which the loader can build the batch again.
        levers: what guards and the like did in this update, and the loss's auxiliary terms (z_loss), by telemetry name.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    targets: int
    loss_scale: float
    skipped: bool
    seconds: float
    embedding_gradient_shrink: float = 1.0
    data_seconds: float = 0.0
    first_sample: int = 0
    levers: Mapping[str, float] = field(default_factory=dict)


class Callback:
    """An observer of the loop. Override what you need; overrides need not call these methods."""

    @property
    def state_name(self) -> str:
        """Name under which a checkpoint keeps ``state_dict``."""
        return type(self).__name__

    def train_start(self, trainer: Trainer) -> None:
        """Before the first step, on a fresh or a restored state."""

    def step_start(self, step: int) -> None:
        """Before the step's first forward pass."""

    def gradients_ready(self, step: int, gradients: GradientSummary) -> None:
        """After gradients are reduced and unscaled, before they are clipped."""

    def step_end(self, info: StepInfo) -> Sequence[Event]:
        """After the update, made or skipped. Returns what the callback noticed at this step."""
        del info
        return ()

    def saving(self, step: int) -> None:
        """Before a checkpoint is written: records of the steps before ``step`` must now outlive this process."""

    def event(self, event: Event) -> None:
        """The loop or the responder did something worth recording. A ``rewind`` supersedes steps >= its own."""

    def train_end(self) -> None:
        """After the last step, also when training stops early or fails. Called once."""

    def state_dict(self) -> Mapping[str, Any]:
        """State that must continue exactly after a resume, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""

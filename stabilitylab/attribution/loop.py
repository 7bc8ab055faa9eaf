"""A training loop to fork: three methods, and the model and optimizer that they move.

    class Loop:
        model, optimizer
        def state_dict(self): ...             everything that the next step depends on
        def load_state_dict(self, state): ...
        def train_step(self, index): ...      the update with batch ``index``; returns its loss

A step must be a function of the state and of ``index``: the same state and index give the same bits. Every fork starts from the
same random state of Python, NumPy and torch, so dropout repeats itself. ``index`` names the batch and nothing else: what counts
updates (a schedule) belongs to the state, since a fork that leaves a batch out makes the same update with the next batch.

A loop may also have these, each for interventions that need it:

    parameters                          the trained tensors by name, where they are not the model's own (fp32 masters)
    weights_changed()                   an intervention wrote to them: round them into the model's weights
    gradients_changed()                 it wrote to their gradients: earlier norms are invalid
    settings_changed()                  it wrote to the optimizer's groups, for loops that compute with a copy
    gradient_factor()                   the clipping factor that the coming update will apply; without it 1
    row_losses(index)                   (loss, gradient norm) of each row of a batch, at the present weights
    train_step_without(index, rows)     the update without some rows of the batch

``train_step`` may return a mapping instead, with ``loss`` and other signals of events (``gradient_norm``, ``loss_scale``).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stabilitylab.errors import InputError
from stabilitylab.model_structure import bare, clean, named_parameters


class Loop(Protocol):
    """See the module's docstring."""

    @property
    def model(self) -> nn.Module:
        """The trained model."""

    @property
    def optimizer(self) -> torch.optim.Optimizer | Sequence[torch.optim.Optimizer]:
        """The optimizer that updates it."""

    def state_dict(self) -> Any:
        """Everything on which the next step depends; the search copies it."""

    def load_state_dict(self, state: Any) -> None:
        """Restore a state; the loop may keep it, since it is a copy."""

    def train_step(self, index: int) -> float | Mapping[str, float]:
        """The update with batch ``index``; its loss in nats."""


@dataclass(frozen=True)
class LoopState:
    """A loop's state with the process's random state, and the next index."""

    index: int
    state: Any
    randomness: tuple[Any, ...]

    @classmethod
    def of(cls, loop: Loop, index: int) -> LoopState:
        """A copy of the present state of ``loop``. Raises InputError where its state cannot be copied."""
        state = loop.state_dict()
        try:
            copied = copy.deepcopy(state)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise InputError(
                f"the state_dict() of {type(loop).__name__} cannot be copied ({error}): give tensors and numbers, "
                "of an iterator over data its place"
            ) from error
        return cls(index, copied, _randomness())

    def put_into(self, loop: Loop) -> None:
        """Bring ``loop`` to this state."""
        loop.load_state_dict(copy.deepcopy(self.state))
        python, numpy, cpu, cuda = self.randomness
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002  the global one, from which loops draw
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _randomness() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


class Subject:
    """A loop as interventions see it: tensors by name, optimizers, and the current step.

    Attributes:
        parameters: the trained tensors by name, those that an optimizer updates.
        step: the fork's step, that is, its index without an intervention.
        acts: whether an intervention acts in this step.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        for method in ("state_dict", "load_state_dict", "train_step"):
            if not callable(getattr(loop, method, None)):
                raise InputError(
                    f"{type(loop).__name__} has no {method}(): a loop has state_dict, load_state_dict, train_step"
                )
        for name in ("model", "optimizer"):
            if getattr(loop, name, None) is None:
                raise InputError(
                    f"{type(loop).__name__} has no .{name}: interventions act on a loop's model and optimizer"
                )
        self.model = bare(loop.model)
        given = loop.optimizer if isinstance(loop.optimizer, Sequence) else (loop.optimizer,)
        # accelerate and others wrap an optimizer in one that forwards to it.
        self.optimizers = tuple(_inner(optimizer) for optimizer in given)
        names: Mapping[str, Tensor] = getattr(loop, "parameters", None) or named_parameters(self.model)
        updated = {
            id(p)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        self.parameters = {clean(name): p for name, p in names.items() if id(p) in updated}
        if not self.parameters:
            raise InputError(f"{type(loop).__name__}.optimizer updates none of its model's parameters")
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.step, self.acts = 0, False

    def of(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """Name, tensor and group of each parameter of ``optimizer``."""
        return [
            (self.names[id(p)], p, group)
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in self.names
        ]

    def weights_changed(self) -> None:
        """Tell the loop: an intervention wrote to the trained tensors."""
        _call(self.loop, "weights_changed")

    def gradients_changed(self) -> None:
        """Tell the loop: it wrote to their gradients."""
        _call(self.loop, "gradients_changed")

    def settings_changed(self) -> None:
        """Tell the loop: it wrote to the optimizer's groups."""
        _call(self.loop, "settings_changed")

    def gradient_factor(self) -> float:
        """The factor by which the coming update multiplies gradients."""
        method: Callable[[], float] | None = getattr(self.loop, "gradient_factor", None)
        return 1.0 if method is None else method()


def _call(loop: Loop, name: str) -> None:
    method = getattr(loop, name, None)
    if method is not None:
        method()


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    while not isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        return inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"optimizer is a {type(optimizer).__name__}: interventions hook a torch.optim.Optimizer's step"
        )
    return optimizer

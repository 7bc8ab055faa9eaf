"""Interventions make a fork go without something: their base class, and those on the optimizer's step.

A fork installs an act once, and calls it in each step in which it acts:

    install(subject)                    hooks of its own
    start(subject)                      the step begins
    forward(subject)                    its first forward pass does
    before(subject, optimizer)          gradients are there, the optimizer is about to use them
    after(subject, optimizer)           it has
    remove()

Withheld parameters keep weight and state to the last bit, and do not decay. The gradients of the others, and the clipping factor
that a loop takes from all of them, stay as they were: so in the fork's first step the others move exactly as they did.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stabilitylab.attribution.loop import Subject

Optimizer = torch.optim.Optimizer
FIRST, SECOND = "exp_avg", "exp_avg_sq"


class Act:
    """Does nothing."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def install(self, subject: Subject) -> None:
        """Before the fork's first step, its state loaded."""

    def start(self, subject: Subject) -> None:
        """Before each step in which it acts."""

    def forward(self, subject: Subject) -> None:
        """Before the step's first forward pass; also in steps in which it does not act."""

    def before(self, subject: Subject, optimizer: Optimizer) -> None:
        """Before an optimizer's step."""

    def after(self, subject: Subject, optimizer: Optimizer) -> None:
        """After it."""

    def index(self, subject: Subject, index: int) -> int:
        """The index of the step's batch."""
        del subject
        return index

    def rows(self, subject: Subject, index: int) -> Sequence[int]:
        """Rows of the batch to leave out."""
        del subject, index
        return ()

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class HoldUpdates(Act):
    """Some parameters stand still: an optimizer skips those without a gradient."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._names = frozenset(names)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def before(self, subject: Subject, optimizer: Optimizer) -> None:
        for name, p, _ in subject.of(optimizer):
            if name in self._names and p.grad is not None:
                self._kept.append((p, p.grad))
                p.grad = None

    def after(self, subject: Subject, optimizer: Optimizer) -> None:
        for p, gradient in self._kept:
            p.grad = gradient
        self._kept.clear()


class HoldRows(Act):
    """Some rows of a table stand still, with their part of the optimizer's state."""

    def __init__(self, name: str, rows: Sequence[int]) -> None:
        super().__init__()
        self._name, self._rows = name, list(rows)
        self._kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def before(self, subject: Subject, optimizer: Optimizer) -> None:
        p = subject.parameters[self._name]
        if not any(q is p for _, q, _ in subject.of(optimizer)):
            return
        state = [
            v for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor) and v.shape == p.shape
        ]
        self._kept = [(tensor, tensor[self._rows].clone()) for tensor in (p, *state)]

    @torch.no_grad()
    def after(self, subject: Subject, optimizer: Optimizer) -> None:
        for tensor, rows in self._kept:
            tensor[self._rows] = rows
        if self._kept:
            subject.weights_changed()
        self._kept.clear()


class ScaleRate(Act):
    """Multiplies the learning rate by a factor, for the update alone: a schedule sees its own."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor
        self._kept: list[tuple[dict[str, Any], Any]] = []

    def before(self, subject: Subject, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            self._kept.append((group, group["lr"]))
            group["lr"] = group["lr"] * self._factor

    def after(self, subject: Subject, optimizer: Optimizer) -> None:
        for group, rate in self._kept:
            group["lr"] = rate
        self._kept.clear()


class ClipNorm(Act):
    """Bounds the norm of all gradients together by ``bound``."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self._bound = bound

    @torch.no_grad()
    def before(self, subject: Subject, optimizer: Optimizer) -> None:
        mine = [p.grad for _, p, _ in subject.of(optimizer) if p.grad is not None]
        every = [p.grad for p in subject.parameters.values() if p.grad is not None]
        if not every:
            return
        norm = float(
            torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in every]))
        )
        if math.isfinite(norm) and norm > self._bound:
            torch._foreach_mul_(mine, self._bound / norm)
            subject.gradients_changed()


class ClipTensors(Act):
    """Bounds the norm of each of some gradients by 1.05 times its usual one."""

    def __init__(self, names: Iterable[str], usual: Mapping[str, float]) -> None:
        super().__init__()
        self._bounds = {name: 1.05 * usual[name] for name in names if usual.get(name, 0.0) > 0}

    @torch.no_grad()
    def before(self, subject: Subject, optimizer: Optimizer) -> None:
        changed = False
        for name, p, _ in subject.of(optimizer):
            if p.grad is None or name not in self._bounds:
                continue
            norm = float(torch.linalg.vector_norm(p.grad.float()))
            if not math.isfinite(norm):
                p.grad.nan_to_num_(0.0, 0.0, 0.0)
                norm = float(torch.linalg.vector_norm(p.grad.float()))
                changed = True
            if norm > self._bounds[name]:
                p.grad.mul_(self._bounds[name] / norm)
                changed = True
        if changed:
            subject.gradients_changed()


class BoundUpdates(Act):
    """Divides each update by max(1, RMS_t), RMS_t = sqrt(mean(g^2 / v)) with the update's v, corrected for bias."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[Tensor, Tensor, Tensor, float, dict[str, Any]]] = []

    @torch.no_grad()
    def before(self, subject: Subject, optimizer: Optimizer) -> None:
        factor = subject.gradient_factor()
        for _, p, group in subject.of(optimizer):
            if p.grad is not None:
                self._kept.append((p, p.detach().clone(), p.grad.detach() * factor, factor, group))

    @torch.no_grad()
    def after(self, subject: Subject, optimizer: Optimizer) -> None:
        for p, old, gradient, _, group in self._kept:
            second = optimizer.state.get(p, {}).get(SECOND)
            betas = group.get("betas")
            if not isinstance(second, Tensor) or not betas:
                continue
            correction = 1 - betas[1] ** steps_of(optimizer, p, group)
            least = float(group.get("eps", 1e-8)) ** 2
            rms = math.sqrt(float((gradient.square() / (second / correction).clamp_min(least)).mean()))
            if rms > 1:
                p.copy_(old + (p - old) / rms)
        if self._kept:
            subject.weights_changed()
        self._kept.clear()


class RenewSecondMoments(Act):
    """Once, before its first update, sets v so that this update's v / (1 - b2^t) is g^2."""

    def __init__(self) -> None:
        super().__init__()
        self._done: set[int] = set()

    @torch.no_grad()
    def before(self, subject: Subject, optimizer: Optimizer) -> None:
        if id(optimizer) in self._done:
            return
        self._done.add(id(optimizer))
        factor = subject.gradient_factor()
        for _, p, group in subject.of(optimizer):
            if p.grad is not None and group.get("betas"):
                self._renew(optimizer, p, group, p.grad * factor)

    def _renew(self, optimizer: Optimizer, p: Tensor, group: Mapping[str, Any], gradient: Tensor) -> None:
        second, beta = optimizer.state.get(p, {}).get(SECOND), group["betas"][1]
        if isinstance(second, Tensor) and beta != 0:
            correction = 1 - beta ** (steps_of(optimizer, p, group) + 1)
            # b2 v + (1 - b2) g^2 = (1 - b2^t) g^2
            second.copy_(gradient.square() * ((correction - (1 - beta)) / beta))


class RenewFirstMoments(RenewSecondMoments):
    """Once, before its first update, sets m so that this update's m / (1 - b1^t) is g."""

    def _renew(self, optimizer: Optimizer, p: Tensor, group: Mapping[str, Any], gradient: Tensor) -> None:
        first, beta = optimizer.state.get(p, {}).get(FIRST), group["betas"][0]
        if isinstance(first, Tensor) and beta != 0:
            correction = 1 - beta ** (steps_of(optimizer, p, group) + 1)
            first.copy_(gradient * ((correction - (1 - beta)) / beta))


class ShrinkGradient(Act):
    """Scales the gradient of some weights as it leaves the backward pass, before a loop takes norms and clips."""

    def __init__(self, names: Iterable[str], factor: float) -> None:
        super().__init__()
        self._names, self._factor = frozenset(names), factor

    def install(self, subject: Subject) -> None:
        for name, p in subject.model.named_parameters():
            if name in self._names and p.requires_grad:
                self.handles.append(
                    p.register_hook(  # type: ignore[no-untyped-call]
                        lambda gradient: gradient * self._factor if subject.acts else gradient
                    )
                )


class LeaveOutBatch(Act):
    """Moves the batches from ``index`` on one step earlier."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index

    def index(self, subject: Subject, index: int) -> int:
        return index + 1 if index >= self._index else index


class OtherData(Act):
    """From ``index`` on gives the earlier batches, backwards."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index

    def index(self, subject: Subject, index: int) -> int:
        return max(0, 2 * self._index - index - 1) if index >= self._index else index


class LeaveOutRows(Act):
    """Leaves out some rows of one batch."""

    def __init__(self, index: int, rows: Sequence[int]) -> None:
        super().__init__()
        self._index, self._rows = index, tuple(rows)

    def rows(self, subject: Subject, index: int) -> Sequence[int]:
        return self._rows if index == self._index else ()


def steps_of(optimizer: Optimizer, p: Tensor, group: Mapping[str, Any]) -> float:
    """Updates that Adam counts for a parameter so far."""
    step = optimizer.state.get(p, {}).get("step", group.get("step", 0))
    return float(step)

"""Puts back what changed between two updates: weights, the optimizer's state, its settings.

Between the end of one update and the beginning of the next nothing has a reason to move a weight or a moment, except in loops that
project or average weights. Those do it at every step, so what changes in the control's first steps is no candidate
(``observation.py``). Any other change is damaged memory, someone's hand, or a plugin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stabilitylab.attribution.interventions import Act, Optimizer
from stabilitylab.attribution.loop import Subject
from stabilitylab.probes.optimizer_settings import setting_names


class LastUpdate:
    """Weights and optimizer state as the last update left them."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.weights = {name: p.detach().clone() for name, p in subject.parameters.items()}
        self.moments: dict[str, dict[str, Tensor]] = {}
        for optimizer in subject.optimizers:
            self.take(optimizer)

    def take(self, optimizer: Optimizer) -> None:
        """Keep what ``optimizer`` has just updated."""
        for name, p, _ in self._subject.of(optimizer):
            self.weights[name].copy_(p.detach())
            self.moments[name] = {
                key: value.detach().clone()
                for key, value in optimizer.state.get(p, {}).items()
                if isinstance(value, Tensor)
            }

    def changed_weights(self, names: Iterable[str]) -> list[str]:
        """Parameters whose weights differ from what the last update left."""
        return [name for name in names if not _same(self._subject.parameters[name], self.weights[name])]

    def changed_moments(self, names: Iterable[str]) -> list[str]:
        """Parameters whose state differs from what it left."""
        return [name for name in names if any(not _same(now, kept) for now, kept in self._pairs(name))]

    def changed_rows(self, name: str) -> list[int]:
        """Rows of a table whose weights differ from what the last update left."""
        now, kept = self._subject.parameters[name].detach(), self.weights[name]
        other = ~((now == kept) | (now.isnan() & kept.isnan()))
        return [int(row) for row in other.flatten(1).any(dim=1).nonzero().flatten()]

    @torch.no_grad()
    def put_back(self, weights: Iterable[str], moments: Iterable[str], rows: Sequence[int] = ()) -> None:
        """Undo the changes; ``rows``: only these rows of the weights."""
        changed = self.changed_weights(weights)
        chosen = list(rows)
        for name in changed:
            if chosen:
                self._subject.parameters[name][chosen] = self.weights[name][chosen]
            else:
                self._subject.parameters[name].copy_(self.weights[name])
        if changed:
            self._subject.weights_changed()
        for name in self.changed_moments(moments):
            for now, kept in self._pairs(name):
                now.copy_(kept)

    def _pairs(self, name: str) -> list[tuple[Tensor, Tensor]]:
        p = self._subject.parameters[name]
        kept = self.moments.get(name, {})
        for optimizer in self._subject.optimizers:
            if p in optimizer.state:
                state: Mapping[str, Any] = optimizer.state[p]
                return [
                    (state[key], value) for key, value in kept.items() if isinstance(state.get(key), Tensor)
                ]
        return []


class PutBack(Act):
    """Gives each step the weights and moments of some parameters as the previous update left them."""

    def __init__(
        self, weights: Iterable[str] = (), moments: Iterable[str] = (), rows: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self._weights, self._moments, self._rows = tuple(weights), tuple(moments), tuple(rows)
        self._snapshots: LastUpdate | None = None

    def install(self, subject: Subject) -> None:
        self._snapshots = LastUpdate(subject)

    def forward(self, subject: Subject) -> None:
        if subject.acts and self._snapshots is not None:
            self._snapshots.put_back(self._weights, self._moments, self._rows)

    def before(self, subject: Subject, optimizer: Optimizer) -> None:
        self.forward(subject)

    def after(self, subject: Subject, optimizer: Optimizer) -> None:
        if self._snapshots is not None:
            self._snapshots.take(optimizer)


class KeepSettings(Act):
    """Gives each update, and nothing else, the optimizer's settings of the fork's first update."""

    def __init__(self) -> None:
        super().__init__()
        self._usual: dict[int, list[dict[str, Any]]] = {}
        self._kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def before(self, subject: Subject, optimizer: Optimizer) -> None:
        now = settings_of(optimizer)
        usual = self._usual.setdefault(id(optimizer), now)
        for group, mine, kept in zip(optimizer.param_groups, now, usual, strict=False):
            if mine != kept:
                self._kept.append((group, mine))
                group.update(kept)
        if self._kept:
            subject.settings_changed()

    def after(self, subject: Subject, optimizer: Optimizer) -> None:
        for group, mine in self._kept:
            group.update(mine)
        if self._kept:
            subject.settings_changed()
        self._kept.clear()


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group, with tensors copied."""
    names = setting_names(optimizer)
    return [
        {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if name in names and _is_setting(value)
        }
        for group in optimizer.param_groups
    ]


def _is_setting(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float, tuple)) and not isinstance(value, bool)


def _same(now: Tensor, kept: Tensor) -> bool:
    if now.shape != kept.shape:
        return False
    now = now.detach()
    # A NaN that was there before is no change.
    return bool(torch.equal(now, kept)) or bool(((now == kept) | (now.isnan() & kept.isnan())).all())

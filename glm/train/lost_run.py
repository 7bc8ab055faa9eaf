"""When to stop a run that is lost for good.

    lost    for ``patience`` steps in a row the loss is ``NATS`` over the first step's, is not finite, or the loss scale overflows
            at its minimum

A spike that recovers within the patience does not count, nor does a skipped update of a loss scale that finds its level. Searches
for the highest rate that a model survives (``experiments``) count a lost run as collapsed; it ends as complete, with ``lost`` in
its last event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glm.train.events import Callback, StepInfo
from glm.train.loop import Trainer
from stabilitylab.telemetry import Event

NATS = 1.0


class LostRule:
    """Counts consecutive bad steps. ``patience`` 0: no run is ever lost."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.first: float | None = None
        self.out = 0

    def update(self, loss: float, *, stuck: bool = False) -> bool:
        """Note a step's loss, and whether its loss scale is stuck. Returns whether the run is lost."""
        if self.first is None:
            self.first = loss
        self.out = self.out + 1 if stuck or not loss <= self.first + NATS else 0
        return 0 < self.patience <= self.out


class EndsWhenLost(Callback):
    """Ends a lost run."""

    def __init__(self, patience: int) -> None:
        self._rule = LostRule(patience)
        self._trainer: Trainer | None = None

    def train_start(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def step_end(self, info: StepInfo) -> Sequence[Event]:
        assert self._trainer is not None
        scaler = getattr(self._trainer.engine, "scaler", None)
        if self._rule.update(info.loss, stuck=scaler is not None and scaler.collapsed):
            self._trainer.lost = True
        return ()

    def state_dict(self) -> Mapping[str, Any]:
        return {"first": self._rule.first, "out": self._rule.out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rule.first, self._rule.out = state["first"], state["out"]

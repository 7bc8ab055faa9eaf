"""The reasons that a log itself shows for a step in its loss: a changed learning rate, batch size, or phase of the data.

``Reasons`` notes each change with its step: a rate that changes by half or more from one value to the next, a batch size (sequences
or tokens per step) by a twentieth or more, another number of the data's phase. An episode that begins within 64 steps after it
carries it as its reason. That does not prove a cause, but the reader of a spike should see it in the same line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabilitylab.telemetry import BATCH_SIZE, DATA_PHASE, LEARNING_RATE

REASONS = frozenset({LEARNING_RATE, BATCH_SIZE, DATA_PHASE})
RATE_FACTOR = 1.5
SIZE_FACTOR = 1.05
_WORDS = {LEARNING_RATE: "learning rate", BATCH_SIZE: "batch size", DATA_PHASE: "data phase"}


def changes(name: str, values_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where ``Reasons.update`` has something to note or to leave out; always at the first value."""
    if name not in REASONS:
        return np.zeros(len(values_N), dtype=np.bool_)
    before_N = np.concatenate([values_N[:1], values_N[:-1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_N = values_N / before_N
    factor = RATE_FACTOR if name == LEARNING_RATE else SIZE_FACTOR
    odd_N = values_N != before_N if name == DATA_PHASE else ~((ratio_N > 1 / factor) & (ratio_N < factor))
    odd_N |= ~np.isfinite(values_N) | (values_N <= 0)
    odd_N[:1] = True
    return np.asarray(odd_N | np.roll(odd_N, 1), dtype=np.bool_)


@dataclass(slots=True)
class Reasons:
    """The latest value of each signal, and its latest change as (step, before, after)."""

    latest: dict[str, float] = field(default_factory=dict)
    changes: dict[str, list[float]] = field(default_factory=dict)

    def update(self, step: int, name: str, value: float) -> None:
        """Take a value; ignore those that are not finite."""
        if not math.isfinite(value) or (name != DATA_PHASE and value <= 0):
            return
        before = self.latest.get(name)
        self.latest[name] = value
        if before is None or before == value:
            return
        factor = RATE_FACTOR if name == LEARNING_RATE else SIZE_FACTOR
        if name == DATA_PHASE or not 1 / factor < value / before < factor:
            self.changes[name] = [step, before, value]

    def pass_over(self, name: str, value: float) -> None:
        """Take ``value``, the last of several among which nothing changed by enough."""
        if name in REASONS:
            self.latest[name] = value

    def before(self, onset: int, within: int) -> dict[str, Any]:
        """What changed within this many steps before ``onset``: ``reason`` as a sentence, and the rate's factor."""
        found = {n: c for n, c in self.changes.items() if 0 <= onset - c[0] <= within}
        if not found:
            return {}
        name, (step, old, new) = max(found.items(), key=lambda item: item[1][0])
        told: dict[str, Any] = {"reason": f"{_WORDS[name]} {old:g} -> {new:g} at step {int(step)}"}
        if LEARNING_RATE in found:
            told["learning_rate_change"] = found[LEARNING_RATE][2] / found[LEARNING_RATE][1]
        return told

    def go_back(self, step: int) -> None:
        """Forget changes at or after ``step``, to which the run has gone back."""
        self.changes = {name: change for name, change in self.changes.items() if change[0] < step}

    def state_dict(self) -> dict[str, Any]:
        return {"latest": dict(self.latest), "changes": {n: list(c) for n, c in self.changes.items()}}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Reasons:
        return cls(dict(state["latest"]), {n: list(c) for n, c in state["changes"].items()})

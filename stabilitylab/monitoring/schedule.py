"""When to measure: every n-th step, each probe at its own cadence, and every step for a while after an event.

The monitor measures steps 0, n, 2n, ... To show a spike closely, it measures everything at every step for ``dense_steps`` steps
after an event of a kind in ``dense_after``. It cannot foresee the event, so the steps before it have only the usual cadence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from stabilitylab.errors import InputError
from stabilitylab.telemetry import ALARMS


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Cadence of the probes.

    Args:
        every: measure each n-th step; 0: never.
        probes: cadence of single probes by name, e.g. ``{"gradients": 1}``; ``every`` holds for the rest.
        dense_steps: number of steps to measure fully after an event; 0: off.
        dense_after: the kinds of event that do so.
    """

    every: int = 10
    probes: Mapping[str, int] = field(default_factory=dict)
    dense_steps: int = 16
    dense_after: frozenset[str] = ALARMS

    def __post_init__(self) -> None:
        for name, every in {"every": self.every, **self.probes}.items():
            if isinstance(every, bool) or not isinstance(every, int) or every < 0:
                raise InputError(f"schedule: {name} is {every!r}; give a whole number of steps; 0 is never")
        if self.dense_steps < 0:
            raise InputError(f"schedule: dense_steps is {self.dense_steps}; give 0 or more")

    def for_recorder(self, costly: Collection[str]) -> Schedule:
        """The same for a flight recorder, which holds every step. The ``costly`` probes, which make a pass of their own, keep their
        cadence: that pass costs far more than holding steps in memory."""
        kept = {name: every for name, every in self.probes.items() if name in costly}
        return Schedule(every=1, probes=kept, dense_after=self.dense_after)

    def due(self, probe: str, step: int, last_event: int | None = None) -> bool:
        """Whether ``probe`` measures ``step``, given the step of the latest alarm."""
        every = self.probes.get(probe, self.every)
        if every == 0:
            return False
        if last_event is not None and last_event < step <= last_event + self.dense_steps:
            return True
        return step % every == 0

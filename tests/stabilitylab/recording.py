"""A sink that keeps every number by name, for looking up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stabilitylab import Monitor
from stabilitylab.probes.base import Probe
from stabilitylab.telemetry import Event, Samples


class Recording:
    """Keeps rows as {(step, metric, index): value} and the events in order."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, str, int], float] = {}
        self.events: list[Event] = []
        self.closed = False

    def write(self, samples: Samples, events: Sequence[Event]) -> None:
        self.events += events
        for event in events:
            if event.kind == "rewind":
                self.rows = {row: value for row, value in self.rows.items() if row[0] < event.step}
        for step, key, value in samples:
            assert (step, key.metric, key.index) not in self.rows, "a number was recorded twice"
            self.rows[step, key.metric, key.index] = value

    def close(self) -> None:
        self.closed = True

    def steps(self, metric: str) -> list[int]:
        return sorted({step for step, name, _ in self.rows if name == metric})

    def vector(self, step: int, metric: str) -> list[float]:
        found = {i: value for (s, name, i), value in self.rows.items() if (s, name) == (step, metric)}
        return [found[i] for i in sorted(found)]

    def site(self, step: int, site: str) -> dict[str, float]:
        """Statistic -> value of one site, of whatever families."""
        return {
            name.rpartition("/")[2]: value
            for (s, name, _), value in self.rows.items()
            if s == step and name.split("/")[1] == site
        }


def watch(
    model: nn.Module, *probes: Probe, optimizer: torch.optim.Optimizer | None = None, **options: object
) -> tuple[Monitor, Recording]:
    """A monitor with these probes alone, measuring every step, and where its numbers go."""
    sink = Recording()
    monitor = Monitor(model, optimizer, every=1, probes=probes, sinks=[sink], detector=None, **options)  # type: ignore[arg-type]
    return monitor, sink

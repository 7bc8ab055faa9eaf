"""A sink takes the monitor's numbers. It has two methods; anything that has them is a sink.

The monitor calls ``write`` once per flush, with the samples and the events since the last one, and ``close`` at the end. A sink
that raises loses what it got: the monitor reports ``telemetry-lost`` and training continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from stabilitylab.telemetry import Event, Samples


@runtime_checkable
class Sink(Protocol):
    """A destination for telemetry."""

    def write(self, samples: Samples, events: Sequence[Event]) -> None:
        """Take the samples and events of one flush. An event of kind ``rewind`` supersedes steps >= its step."""

    def close(self) -> None:
        """Write the rest and release every resource. Called once, after the last ``write``."""

"""A sink in front of a sink: writes full resolution around an alarm without writing everything.

The monitor measures every step. The recorder passes on rows due by the usual cadence at once, and holds the others of the last
``keep`` steps in memory. When an episode graver than a hard batch begins, it writes the held rows, and for ``after`` steps passes
everything on. So the disk has the run at the usual cadence, and every step before and after each alarm.

    Monitor(model, optimizer, every=1, sinks=[FlightRecorder(ParquetSink(folder), keep=64, every=10)])

It drops held rows that a ``rewind`` supersedes. The rows of ``keep`` steps bound its memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stabilitylab.errors import InputError
from stabilitylab.sinks.base import Sink
from stabilitylab.telemetry import DEPARTURES, Event, Key, Samples

# The step's own numbers are few, and readers expect them at every step.
EVERY_STEP: Mapping[str, int] = {"train": 1, "precision": 1}


class FlightRecorder:
    """Thins rows before ``sink``, and passes all of them on around an alarm.

    Args:
        sink: the sink behind it.
        keep: number of steps held.
        every: cadence of rows written without an alarm.
        cadence: family -> its own cadence.
        after: steps written in full after an alarm.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        keep: int,
        every: int,
        cadence: Mapping[str, int] = EVERY_STEP,
        after: int = 16,
    ) -> None:
        if keep < 1 or every < 1:
            raise InputError(f"flight recorder: keep={keep} and every={every} count steps, at least 1 each")
        self._sink = sink
        self._keep = keep
        self._every = every
        self._cadence = dict(cadence)
        self._after = after
        self._held: deque[Samples] = deque()
        self._full_until = -1
        self._keys: tuple[Key, ...] = ()
        self._cadence_of_key: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def write(self, samples: Samples, events: Sequence[Event]) -> None:
        """Take one flush; the module's docstring says which rows pass."""
        for event in events:
            if event.kind == "rewind":
                self._held = deque(_rows(held, held.step < event.step) for held in self._held)
                self._full_until = -1
        alarms = [event.step for event in events if event.is_alarm or event.kind in DEPARTURES]
        if alarms:
            while self._held:
                self._sink.write(self._held.popleft(), ())
            self._full_until = max(alarms) + self._after
        due = (samples.step % self._cadence_for(samples) == 0) | (samples.step <= self._full_until)
        self._sink.write(_rows(samples, due), events)
        self._hold(_rows(samples, ~due))

    def close(self) -> None:
        """Close the sink; rows held without an alarm are not written."""
        self._held.clear()
        self._sink.close()

    def _hold(self, samples: Samples) -> None:
        if not len(samples):
            return
        self._held.append(samples)
        oldest = int(samples.step.max()) - self._keep
        while self._held and self._held[0].step.max(initial=-1) <= oldest:
            self._held.popleft()

    def _cadence_for(self, samples: Samples) -> NDArray[np.int64]:
        if samples.keys is not self._keys:
            self._keys = samples.keys
            self._cadence_of_key = np.array(
                [self._cadence.get(key.family, self._every) for key in samples.keys], dtype=np.int64
            )
        return self._cadence_of_key[samples.key]


def _rows(samples: Samples, which: NDArray[np.bool_]) -> Samples:
    return Samples(samples.keys, samples.step[which], samples.key[which], samples.value[which])

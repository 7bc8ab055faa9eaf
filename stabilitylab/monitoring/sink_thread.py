"""Passes numbers from the monitor to the sinks in its own thread: training never waits for a disk.

The monitor posts each flush; the thread turns it into ``Samples`` and hands it to every sink in order. A sink that raises loses
only that flush: an event ``telemetry-lost`` reports the loss (once when it begins, once with the total when the sink works again or
the run ends), and the other sinks and the training continue. If the sinks fall behind by ``LIMIT`` steps, the thread drops further
samples and reports that in the same way; it never drops events.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stabilitylab.monitoring.alarms import Alarms
from stabilitylab.monitoring.site_watch import SiteWatch
from stabilitylab.probes.base import Probe, Readings
from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks.base import Sink
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.telemetry import Event, Key, Samples

LIMIT = 10_000
_log = logging.getLogger("stabilitylab")


@dataclass
class Flush:
    """What the monitor posts: readings of some steps, numbers yet to become readings, and events."""

    readings: list[tuple[int, Readings]] = field(default_factory=list)
    unfinished: list[tuple[int, Sequence[tuple[Probe, Gathered]]]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def finish(self, watch: SiteWatch | None = None) -> list[Event]:
        """Make readings of everything; returns the events that they reveal."""
        found_here: list[Event] = []
        for step, found in self.unfinished:
            of_step = [probe.finish(gathered) for probe, gathered in found]
            for readings in of_step:
                self.readings.append((step, readings))
                found_here += [Event(step=step, kind=kind, data=data) for kind, data in readings.events]
            if watch is not None:
                found_here += watch.events(step, of_step)
        self.unfinished = []
        self.events += found_here
        return found_here


class EventLog:
    """The sink behind ``events.jsonl``."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def write(self, samples: Samples, events: Sequence[Event]) -> None:
        """Append the events; ignore samples."""
        self._run.append_events(events)

    def close(self) -> None:
        """Nothing to close."""


class _Numbering:
    """Gives every key a number; the tuple of keys stays the same object until a new key appears."""

    def __init__(self) -> None:
        self._number: dict[Key, int] = {}
        self._keys: tuple[Key, ...] = ()
        self._cached: dict[int, tuple[tuple[Key, ...], NDArray[np.int32]]] = {}

    def samples(self, readings: Sequence[tuple[int, Readings]]) -> Samples:
        numbers = [self._numbers(reading.keys) for _, reading in readings]
        if len(self._number) != len(self._keys):
            self._keys = tuple(self._number)
        return Samples(
            self._keys,
            np.repeat([s for s, _ in readings], [len(r.values) for _, r in readings]).astype(np.int64),
            np.concatenate([*numbers, np.empty(0, np.int32)]),
            np.concatenate([*(r.values for _, r in readings), np.empty(0)]),
        )

    def _numbers(self, keys: tuple[Key, ...]) -> NDArray[np.int32]:
        cached = self._cached.get(id(keys))
        if cached is None or cached[0] is not keys:
            number = self._number
            array = np.array([number.setdefault(key, len(number)) for key in keys], dtype=np.int32)
            if len(self._cached) > 256:
                self._cached.clear()
            cached = self._cached[id(keys)] = (keys, array)
        return cached[1]


class SinkThread:
    """Owns the sinks and the thread that feeds them.

    Args:
        sinks: in the order of writing. The event log, if any, comes first.
        watch: looks at every site of every measured step; None for none.
        told: reports the events that the readings reveal; None for none.
    """

    def __init__(
        self, sinks: Sequence[Sink], *, watch: SiteWatch | None = None, told: Alarms | None = None
    ) -> None:
        self._sinks, self._watch, self._told = list(sinks), watch, told
        self._lost: dict[int, int] = {}
        self._reports: list[Event] = []
        self._numbering = _Numbering()
        self._queue: queue.SimpleQueue[tuple[Flush, int] | threading.Event | None] = queue.SimpleQueue()
        # Reentrant: a monitor dropped unclosed posts what it has from wherever garbage collection runs.
        self._lock = threading.RLock()
        self._waiting = 0
        self._dropped = 0
        self._step = 0
        self._thread = threading.Thread(target=self._run, name="stabilitylab-sinks", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def post(self, flush: Flush) -> None:
        """Hand over a flush; returns at once."""
        steps = len(flush.readings) + len(flush.unfinished)
        if self._waiting + steps > LIMIT:
            self._dropped += steps
            flush.readings, flush.unfinished, steps = [], [], 0
        elif self._dropped:
            lost = {"sink": "all", "steps": self._dropped, "reason": "the sinks fell behind"}
            flush.events.append(Event(step=self._step, kind="telemetry-lost", data=lost))
            self._dropped = 0
        with self._lock:
            self._waiting += steps
        self._queue.put((flush, steps))

    @property
    def waiting(self) -> int:
        """Steps posted and not yet written."""
        return self._waiting

    def wait(self) -> None:
        """Return when everything posted so far is written, and on disk where a sink can ``flush``."""
        if self._thread.is_alive():
            done = threading.Event()
            self._queue.put(done)
            done.wait()

    def close(self) -> None:
        """Write what is left, close every sink, end the thread. A second call does nothing."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                break
            if isinstance(item, threading.Event):
                for sink in self._sinks:
                    if (flush_sink := getattr(sink, "flush", None)) is not None:
                        flush_sink()
                item.set()
                continue
            flush, steps = item
            try:
                found = flush.finish(self._watch)
                if self._told is not None:
                    self._told.hear(found)
                self._deliver(flush)
            except Exception:
                # Our own defect: the run must neither lose its thread over it nor hide it.
                _log.exception("telemetry lost: a flush could not be prepared")
            with self._lock:
                self._waiting -= steps
        self._end()

    def _deliver(self, flush: Flush) -> None:
        samples = self._numbering.samples(flush.readings)
        events = [*flush.events, *self._reports]
        self._reports = []
        self._step = max([self._step, *samples.step[-1:].tolist(), *(event.step for event in events)])
        for i, sink in enumerate(self._sinks):
            try:
                sink.write(samples, events)
            except Exception as error:
                self._report_failure(i, sink, len(samples), error)
            else:
                if self._lost.get(i):
                    self._report_total(i, sink)
        if self._reports and (len(samples) or flush.events):
            self._deliver(Flush())

    def _report_failure(self, i: int, sink: Sink, values: int, error: Exception) -> None:
        first = not self._lost.get(i)
        self._lost[i] = self._lost.get(i, 0) + max(values, 1)
        if first:
            reason = f"{type(error).__name__}: {error}"
            _log.warning(
                "telemetry lost: %s could not write (%s); training continues", type(sink).__name__, reason
            )
            data = {"sink": type(sink).__name__, "values": values, "reason": reason}
            self._reports.append(Event(step=self._step, kind="telemetry-lost", data=data))

    def _report_total(self, i: int, sink: Sink) -> None:
        data = {"sink": type(sink).__name__, "values": self._lost.pop(i), "reason": "total until now"}
        self._reports.append(Event(step=self._step, kind="telemetry-lost", data=data))

    def _end(self) -> None:
        for i, sink in enumerate(self._sinks):
            if self._lost.get(i):
                self._report_total(i, sink)
        if self._reports:
            self._deliver(Flush())
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                _log.warning("telemetry lost: %s could not be closed (%s)", type(sink).__name__, reason)

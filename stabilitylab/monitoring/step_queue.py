"""Queues finished steps, in order: their numbers arrive, the detector judges them, and they go to the sinks.

The detector gets the step's own numbers and, for measured steps, the largest attention score of the whole model
(``attention/-/score_max``) and the RMS of its update over the learning rate (``update/-/rms_over_rate``).

On a CPU a step's numbers are there when it ends. On an accelerator they are still in transfer, and the step waits in line for them;
the training thread asks at the end of each step and never waits.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stabilitylab.monitoring.alarms import Alarms
from stabilitylab.monitoring.loop_values import Numbers
from stabilitylab.monitoring.rank_gather import Manifest, Received
from stabilitylab.monitoring.sink_thread import Flush, SinkThread
from stabilitylab.probes.base import Probe, Readings
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.statistics.transfer import Seen, Transfer
from stabilitylab.telemetry import (
    GRADIENT_NORM,
    LEARNING_RATE,
    LOSS,
    LOSS_SCALES,
    RUN_SITE,
    SCALAR,
    SKIPPED,
    Event,
    Key,
)

# Values of `step` with metric names of their own; all others become train/-/<name>.
_FAMILY = {"loss_scale": "precision"}
_NEAR = 16
_WATCHED = (LEARNING_RATE, SKIPPED, LOSS_SCALES[0])


_log = logging.getLogger("stabilitylab")


class Detector(Protocol):
    """Judges a step's values as they come; ``stabilitylab.spikes.SpikeDetector`` is one.

    Attributes ``loss`` and ``gradient_norm``, if it has them, name its metrics for these.
    """

    def update(self, step: int, values: Mapping[str, float]) -> Sequence[Event]:
        """Events from this step's values."""

    def finish(self) -> Sequence[Event]:
        """Events for episodes still open."""

    def state_dict(self) -> dict[str, Any]:
        """The detector's memory, as plain JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


def default_detector() -> Detector:
    """The project's own detector."""
    from stabilitylab.spikes import SpikeDetector

    return SpikeDetector()


@dataclass(slots=True, kw_only=True)
class Ended:
    """A step that is over, whose numbers may still be in transfer.

    Args:
        step: its number.
        numbers: the step's own.
        distant: names of the numbers on an accelerator, in the order of the transfer's ``others``.
        transfer: brings them, and this rank's packet; None if there is nothing to bring.
        manifest: says which part of the packet belongs to which probe and site.
        received: the packets of all ranks, in place of this one's.
    """

    step: int
    numbers: Numbers
    distant: tuple[str | Key, ...] = ()
    transfer: Transfer | None = None
    manifest: Manifest = ()
    received: Received | None = None

    def found(self) -> list[tuple[Manifest, NDArray[np.uint8]]]:
        """Each rank's manifest and packet, once the transfer is ready."""
        if self.received is not None:
            return self.received.found
        if self.transfer is None or not self.manifest:
            return []
        return [(self.manifest, self.transfer.packet())]


class StepQueue:
    """Passes finished steps through the detector to the sinks.

    Args:
        probes: by name, to finish their numbers.
        detector: judges the values; None for none.
        sink_thread: takes the readings and events.
        alarms: kinds of event after which the monitor watches training more closely.
        flush_every: steps between handovers to it; events go at once.
        told: reports alarms; None for none.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        detector: Detector | None,
        sink_thread: SinkThread,
        *,
        alarms: frozenset[str],
        flush_every: int,
        told: Alarms | None = None,
    ) -> None:
        self._probes = {probe.name: probe for probe in probes}
        self._detector, self._told = detector, told
        loss, norm = getattr(detector, "loss", LOSS), getattr(detector, "gradient_norm", GRADIENT_NORM)
        self._watched = (loss, norm, *_WATCHED)
        self._sink_thread = sink_thread
        self._alarms = alarms
        self._flush_every = flush_every
        self._flush = Flush()
        self._steps = 0
        self._pending: deque[Ended] = deque()
        self._keys: dict[tuple[str | Key, ...], tuple[Key, ...]] = {}
        self.alarm: int | None = None

    def add(self, ended: Ended) -> list[Event]:
        """Put a step in line; returns the detector's events for the steps that have arrived."""
        self._pending.append(ended)
        return self.settle()

    def settle(self, *, wait: bool = False) -> list[Event]:
        """Process the steps whose numbers have arrived, or wait for all."""
        found: list[Event] = []
        near = False
        while self._pending:
            transfer = self._pending[0].transfer
            if transfer is not None:
                if wait:
                    transfer.wait()
                elif not transfer.ready():
                    break
            ended = self._pending.popleft()
            near |= self.alarm is not None and ended.step <= self.alarm + _NEAR
            found += self._take(ended)
        # Whoever hears of an alarm may end the run: do not hold back what follows it.
        if found or near or self._steps >= self._flush_every:
            self.post()
        return found

    def event(self, event: Event) -> None:
        """Record an event at once."""
        self._flush.events.append(event)
        if self._told is not None:
            self._told.hear((event,))
        if event.kind in self._alarms:
            self.alarm = event.step
        self.post()

    def post(self) -> None:
        """Hand over everything so far."""
        if self._flush.readings or self._flush.events or self._flush.unfinished:
            self._sink_thread.post(self._flush)
        self._flush, self._steps = Flush(), 0

    def finish(self) -> None:
        """End: wait for all numbers, and let the detector close what is open."""
        self.settle(wait=True)
        if self._detector is not None:
            self._flush.events += self._guarded(self._detector.finish, 0)
        self.post()

    def _take(self, ended: Ended) -> list[Event]:
        arrived = ended.transfer.others() if ended.transfer is not None else []
        distant = dict(zip(ended.distant, arrived, strict=True))
        numbers: dict[str | Key, float] = {
            name: float(distant.get(name, value)) for name, value in ended.numbers.items()
        }
        by_probe: dict[str, list[tuple[Seen, NDArray[np.uint8]]]] = {}
        for manifest, packet in ended.found():
            for name, seen in manifest:
                by_probe.setdefault(name, []).append((seen, packet))
        gathered = [(self._probes[name], Gathered(seen)) for name, seen in by_probe.items()]
        if gathered:
            self._flush.unfinished.append((ended.step, gathered))
        companions: dict[str, float] = {}
        for probe, of_probe in gathered:
            if (companions_of := getattr(probe, "companions", None)) is not None:
                companions |= companions_of(of_probe, numbers)
        # The loop's norm counts, or its clipping's; else the probe's is recorded as the step's own.
        if (norm := companions.pop(GRADIENT_NORM, None)) is not None:
            numbers.setdefault("gradient_norm", norm)
        if "skipped" in numbers:
            numbers[f"precision/{RUN_SITE}/skipped"] = numbers["skipped"]
        names = tuple(numbers)
        keys = self._keys.get(names)
        if keys is None:
            keys = self._keys[names] = tuple(_key(name) for name in names)
        values = np.array(list(numbers.values()), dtype=np.float64)
        self._flush.readings.append((ended.step, Readings(keys, values)))
        self._steps += 1
        own = {k.metric: v for k, v in zip(keys, values.tolist(), strict=True) if k.index == SCALAR}
        watched = {m: own[m] for m in self._watched if m in own} | companions
        return self._judge(ended.step, watched, gathered)

    def _judge(
        self, step: int, numbers: Mapping[str, float], gathered: Sequence[tuple[Probe, Gathered]]
    ) -> list[Event]:
        if self._detector is None:
            return []
        detector = self._detector
        events = self._guarded(lambda: detector.update(step, numbers), step)
        events = [_with_site(e, gathered) if e.kind == "non-finite" else e for e in events]
        self._flush.events += events
        if self._told is not None:
            self._told.hear(events)
        if any(event.kind in self._alarms for event in events):
            self.alarm = step
        return events

    def _guarded(self, judge: Callable[[], Sequence[Event]], step: int) -> list[Event]:
        """The detector's events. One that raises is dropped, and training continues."""
        try:
            return list(judge())
        except Exception as error:
            name, reason = type(self._detector).__name__, f"{type(error).__name__}: {error}"
            self._detector = None
            _log.exception("the detector %s failed at step %d; training continues without it", name, step)
            return [Event(step=step, kind="telemetry-lost", data={"detector": name, "reason": reason})]


def _with_site(event: Event, gathered: Sequence[tuple[Probe, Gathered]]) -> Event:
    """Add to a measured step's non-finite event the place where the first tensor left its format."""
    if not event.is_alarm:
        return event
    for probe, of_probe in gathered:
        if probe.name == "precision":
            for kind, data in probe.finish(of_probe).events:
                if kind == "overflow":
                    return replace(event, data={**event.data, **data})
    return event


def _key(name: str | Key) -> Key:
    if isinstance(name, Key):
        return name
    if "/" in name:
        return Key.parse(name)
    return Key(_FAMILY.get(name, "train"), RUN_SITE, name)

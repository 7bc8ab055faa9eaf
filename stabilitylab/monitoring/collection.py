"""Decides which probes measure a step, and sends their numbers to the host: of this process alone, or of all ranks.

``arm`` decides whether to measure a step when the step before it ends, so that an unmeasured step needs no hooks. All ranks use the
last alarm that is known to all: a rank that measured alone would wait for the others forever.
"""

from __future__ import annotations

from torch import Tensor

from stabilitylab.monitoring.loop_values import Numbers
from stabilitylab.monitoring.probe_set import ProbeSet
from stabilitylab.monitoring.rank_gather import RankGather
from stabilitylab.monitoring.schedule import Schedule
from stabilitylab.monitoring.step_queue import Ended
from stabilitylab.statistics.buffer import Buffer
from stabilitylab.statistics.transfer import Transfer


class Collection:
    """Begins steps and ends them.

    Args:
        probe_set: the probes.
        buffer: takes the measurements.
        ranks: the processes whose telemetry becomes one; None for this one alone.

    Attributes:
        alarm: the step of the last alarm that is known to all ranks.
        next: the step that has begun.
    """

    def __init__(self, probe_set: ProbeSet, buffer: Buffer, ranks: RankGather | None) -> None:
        self._probe_set, self._buffer, self._ranks = probe_set, buffer, ranks
        self._due = False
        self.alarm: int | None = None
        self.next: int | None = None

    def arm(self, schedule: Schedule, step: int, *, first: bool = False) -> None:
        """Begin a step. The very first one is measured whatever its number, which nobody has said yet."""
        probes = self._probe_set.probes
        due = [probe for probe in probes if schedule.due(probe.name, 0 if first else step, self.alarm)]
        self._due, self.next = bool(due), step
        self._probe_set.arm(step, due)

    def ended(self, step: int, numbers: Numbers, *, alarm: int | None) -> Ended:
        """Collect what the probes found, and start its transfer to the host.

        Args:
            step: its number.
            numbers: the step's own.
            alarm: the step of the last alarm that this process knows of.
        """
        manifest = self._probe_set.manifest()
        distant = {n: v for n, v in numbers.items() if isinstance(v, Tensor) and v.device.type != "cpu"}
        ended = Ended(step=step, numbers=numbers, distant=tuple(distant), manifest=manifest)
        parts = self._buffer.parts() if manifest else []
        if self._ranks is not None and self._due:
            ended.received = self._ranks.exchange(manifest, parts, alarm)
            self.alarm = ended.received.alarm
            parts = []
            if self._ranks.rank != 0:
                ended.received, ended.manifest = None, ()
        if parts or distant:
            ended.transfer = Transfer(parts, list(distant.values()))
        return ended

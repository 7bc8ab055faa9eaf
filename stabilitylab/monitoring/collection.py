"""Which probes measure a step, and what they found, on its way to the host: alone, or from all ranks.

Whether a step is measured is decided when the step before it ends (``arm``), so that the hooks of an unmeasured step need not
exist. Of several ranks all go by the last alarm that all know of: one that measured alone would wait for the others for ever.
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
        probe_set: what measures.
        buffer: where it measures to.
        ranks: the processes whose telemetry becomes one; None for this one alone.

    Attributes:
        alarm: the step of the last alarm that all ranks know of.
        next: the step that has begun.
    """

    def __init__(self, probe_set: ProbeSet, buffer: Buffer, ranks: RankGather | None) -> None:
        self._probe_set, self._buffer, self._ranks = probe_set, buffer, ranks
        self._due = False
        self.alarm: int | None = None
        self.next: int | None = None

    def arm(self, schedule: Schedule, step: int, *, first: bool = False) -> None:
        """A step begins. The very first one is measured whatever its number: nobody has said yet which one it is."""
        probes = self._probe_set.probes
        due = [probe for probe in probes if schedule.due(probe.name, 0 if first else step, self.alarm)]
        self._due, self.next = bool(due), step
        self._probe_set.arm(step, due)

    def ended(self, step: int, numbers: Numbers, *, alarm: int | None) -> Ended:
        """Collect what the probes found and set it on its way to the host.

        Args:
            step: its number.
            numbers: its own.
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

"""Where the gradient lies in the range of its accumulation format, before the loss scale is divided out.

Only the trainer has these gradients, so it hands them over (``take``). ``glm.precision.gradient_range`` counts; the monitor merges
the counts over ranks, in its one collective.

Family ``precision``, site ``-``:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| gradient_elements | elements of all gradients | 1 | gradient_range.py |
| overflowed_elements | infinite or NaN | 1 | gradient_range.py |
| zero_elements | exactly 0: underflowed, or truly zero | 1 | gradient_range.py |
| subnormal_elements | below the smallest normal number of the format | 1 | gradient_range.py |

With several processes these are sums over every accumulated gradient. What tensor-parallel ranks hold alike counts once. Under
ZeRO-0 and -1 each replica accumulates a gradient of its own, and so does each end of a pipeline for an embedding that both have:
the counts cover all of them. Under ZeRO-2 and -3 the replicas accumulate one sum together, and each element counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from glm.precision import count_all
from stabilitylab.probes.base import Context, Found, Readings
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.telemetry import RUN_SITE, Key

STATISTICS = ("gradient_elements", "overflowed_elements", "zero_elements", "subnormal_elements")


class GradientRangeProbe:
    """Counts the elements of the gradients that it is given; see the module's docstring."""

    name = "gradient_range"

    def __init__(self) -> None:
        self._keys = tuple(Key("precision", RUN_SITE, statistic) for statistic in STATISTICS)
        self._slots: Slots | None = None
        self._armed = False

    def attach(self, context: Context) -> None:
        """Nothing is hooked."""
        self._buffer = context.buffer

    def arm(self, measured: bool) -> None:
        """Whether ``take`` counts."""
        self._armed = measured

    def take(self, accumulated: Iterable[Tensor]) -> None:
        """Count the elements of gradients as they were accumulated."""
        if not self._armed:
            return
        elements, counts = count_all(accumulated)
        if counts is None:
            return
        found = counts.double()
        if self._slots is None:
            self._slots = self._buffer.reserve("sums", len(STATISTICS), found.device)
        self._buffer.put(self._slots, torch.cat([found.new_full((1,), float(elements)), found]))

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float | Slots
    ) -> None:
        """Ignore these: they are in fp32, with the scale divided out."""

    def collect(self) -> Found | None:
        """What was taken in this step."""
        if self._slots is None or self._slots.stamp != self._buffer.stamp:
            return None
        return Found(sites=(RUN_SITE,), slots=[(self._slots,)])

    def finish(self, gathered: Gathered) -> Readings:
        """The table's statistics."""
        return Readings(self._keys, gathered.rows()[0])

    def detach(self) -> None:
        """Nothing was attached."""

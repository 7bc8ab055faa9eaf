"""Where numbers leave the format: the first tensor that went non-finite, in the order of computation.

The probe reads what the other probes have counted in the same step: activations in the order of the forward pass, then gradients of
activations in the order of the backward pass, then gradients of parameters. It measures nothing itself, and so sees nothing in a
step that the others do not measure.

Family ``precision``, site ``-`` unless said otherwise:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| nonfinite_activations | activation tensors of this step with a NaN or infinite element | 1 | activations.py |
| nonfinite_activation_gradients | gradients of activations with such an element | 1 | activation_gradients.py |
| nonfinite_gradients | parameters whose gradient has such an element | 1 | gradients.py |
| first_overflow | at the site of the first of these: 1 activation, 2 gradient of an activation, 3 of a parameter | 1 | see above |

The monitor records ``loss_scale`` and ``skipped`` from what the trainer reports. The first overflow is also an event ``overflow``
with ``site`` and ``tensor``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from stabilitylab.probes.activation_gradients import ActivationGradientProbe
from stabilitylab.probes.activations import ActivationProbe
from stabilitylab.probes.base import Context, Found, Readings
from stabilitylab.probes.gradients import GradientProbe
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.statistics.summary import COLUMN
from stabilitylab.telemetry import RUN_SITE, Key

TENSORS = ("activation", "activation_gradient", "gradient")
COUNTS = ("nonfinite_activations", "nonfinite_activation_gradients", "nonfinite_gradients")


class PrecisionProbe:
    """Finds the overflow site; see the module's docstring.

    Args:
        activations, activation_gradients, gradients: the probes whose counts it reads; None for a probe that is not in use.
    """

    name = "precision"

    def __init__(
        self,
        activations: ActivationProbe | None = None,
        activation_gradients: ActivationGradientProbe | None = None,
        gradients: GradientProbe | None = None,
    ) -> None:
        self._probes = (activations, activation_gradients, gradients)
        self._keys: dict[tuple[str, ...], tuple[Key, ...]] = {}

    def attach(self, context: Context) -> None:
        """Nothing is hooked."""

    def arm(self, measured: bool) -> None:
        """Nothing to prepare."""

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float | Slots
    ) -> None:
        """Nothing to do for this probe."""

    def collect(self) -> Found | None:
        """The other probes' summaries, in the order of computation."""
        sites: list[str] = []
        slots: list[tuple[Slots | None, ...]] = []
        for number, probe in enumerate(self._probes, start=1):
            for site, summary in probe.order if probe is not None else ():
                sites.append(f"{number}/{site}")
                slots.append((summary.row,))
        return Found(sites=tuple(sites), slots=slots) if sites else None

    def finish(self, gathered: Gathered) -> Readings:
        """The table's statistics, of the probes that saw anything in this step."""
        bad: dict[int, list[str]] = {}
        nonfinite = gathered.rows()[:, COLUMN["nonfinite"]] > 0
        for name, is_bad in zip(gathered.sites, nonfinite.tolist(), strict=True):
            kind, _, site = name.partition("/")
            of_kind = bad.setdefault(int(kind), [])
            if is_bad:
                of_kind.append(site)
        metrics = [f"precision/{RUN_SITE}/{COUNTS[number - 1]}" for number in bad]
        values = [float(len(sites)) for sites in bad.values()]
        events: tuple[tuple[str, dict[str, str]], ...] = ()
        first = next(((number, sites[0]) for number, sites in sorted(bad.items()) if sites), None)
        if first is not None:
            number, site = first
            metrics.append(f"precision/{site}/first_overflow")
            values.append(float(number))
            events = (("overflow", {"site": site, "tensor": TENSORS[number - 1]}),)
        names = tuple(metrics)
        if names not in self._keys:
            self._keys[names] = tuple(Key.parse(metric) for metric in names)
        return Readings(self._keys[names], np.array(values), events)

    def detach(self) -> None:
        """Nothing was attached."""

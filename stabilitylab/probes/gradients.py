"""Gradients of every parameter: how large, how spread, how much of the whole, and whether the format still holds them.

The probe reads the gradient where it is final: reduced over ranks, unscaled, not yet clipped. A parameter without a gradient
(frozen, unused) has no row; a parameter under several names (tied) counts once, under its first name. Where the trainer hands over
a parameter's norm alone, the probe records ``l2`` and ``share``.

Family ``gradient``, site = parameter path:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| l2 | Euclidean norm, sqrt(sum g^2) | gradient | definition |
| absmax | largest magnitude; NaN if any element is | gradient | definition |
| mean | arithmetic mean | gradient | definition |
| std | population standard deviation | gradient | definition |
| zero_fraction | share of elements equal to 0 | 1 | definition |
| subnormal_fraction | share with 0 < abs(g) < the format's smallest normal number | 1 | IEEE 754-2019, 3.4 |
| nonfinite_fraction | share of NaN and infinite elements | 1 | IEEE 754-2019, 3.4 |
| share | l2^2 / sum over parameters of l2^2: this parameter's part in the global norm | 1 | definition |

``subnormal_fraction`` describes the gradient as stored: with the loss scale, where the trainer has not divided it out yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from stabilitylab.compat import is_dtensor
from stabilitylab.probes.base import Context, Found, KeyTable, Readings
from stabilitylab.statistics import power_sums
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.statistics.summary import COLUMN, FIELDS, Summary, measurable
from stabilitylab.statistics.summary_batch import SummaryBatch
from stabilitylab.telemetry import GRADIENT_NORM, Key

STATISTICS = (
    "l2",
    "absmax",
    "mean",
    "std",
    "zero_fraction",
    "subnormal_fraction",
    "nonfinite_fraction",
    "share",
)
BATCHES = 8


class GradientProbe:
    """Statistics of every parameter's gradient; see the module's docstring."""

    name = "gradients"

    def __init__(self) -> None:
        self._summaries: dict[str, Summary] = {}
        # By the names that one call hands over: with several optimizers, each has its own.
        self._batches: dict[tuple[str, ...], SummaryBatch] = {}
        self._full = KeyTable("gradient", STATISTICS)
        self._short = KeyTable("gradient", ("l2", "share"))
        self._norms: dict[str, float] = {}
        self._scale: float | Slots = 1.0
        self._seen: tuple[str, ...] = ()
        self._found: Found | None = None
        # The names that ``finish`` got last, and which of them to keep.
        self._asked: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self._kept: tuple[list[int], list[int], tuple[Key, ...]] = [], [], ()

    def attach(self, context: Context) -> None:
        """Hook nothing: the monitor hands the gradients over."""
        self._context = context

    def arm(self, measured: bool) -> None:
        """Forget the last step."""
        self._norms = {}
        self._seen = ()

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float | Slots
    ) -> None:
        """Summarise these gradients, each in its own slots; several calls in a step add up, and the last counts for a gradient
        given twice."""
        self._scale = scale
        names, tensors = [], []
        for name, gradient in gradients.items():
            is_shard = type(gradient) is not Tensor
            if is_shard:
                gradient, is_shard = local_part(gradient)
            if measurable(gradient):
                if name not in self._summaries:
                    self._summaries[name] = self._summary(name, is_shard)
                names.append(name)
                tensors.append(gradient)
        together = tuple(names)
        self._seen = tuple(dict.fromkeys((*self._seen, *together))) if self._seen else together
        if together not in self._batches:
            if len(self._batches) >= BATCHES:
                self._batches.clear()
            summaries = [self._summaries[name] for name in names]
            self._batches[together] = SummaryBatch(self._context.buffer, summaries)
        if not self._batches[together].take(tensors):
            self._found = None
        self._norms |= {name: float(norm) for name, norm in norms.items() if name not in gradients}

    def _summary(self, name: str, is_shard: bool) -> Summary:
        is_shard = is_shard or self._context.is_scattered(name)
        region = "rows" if is_shard else "shards" if self._context.is_sharded(name) else "replicated"
        return Summary(self._context.buffer, region=region)

    @property
    def order(self) -> list[tuple[str, Summary]]:
        """The step's parameters in the order of the backward pass: from the last to the first."""
        return [(name, self._summaries[name]) for name in reversed(self._seen)]

    def collect(self) -> Found | None:
        """Every parameter that had a gradient."""
        if not self._seen and not self._norms:
            return None
        last = self._found
        if last is None or last.sites != self._seen or (last.scale, last.extra) != (self._scale, self._norms):
            slots: list[tuple[Slots | None, ...]] = [(self._summaries[name].row,) for name in self._seen]
            last = self._found = Found(sites=self._seen, slots=slots, scale=self._scale, extra=self._norms)
        return last

    def finish(self, gathered: Gathered) -> Readings:
        """The table's statistics, of the parameters that the user asked for."""
        full, short = statistics(gathered)
        asked = (gathered.sites, tuple(gathered.extra))
        if asked != self._asked:
            self._asked, self._kept = asked, self._keep(*asked)
        keep, keep_given, keys = self._kept
        return Readings(keys, np.concatenate([full[keep].ravel(), short[keep_given].ravel()]))

    def _keep(
        self, sites: tuple[str, ...], given: tuple[str, ...]
    ) -> tuple[list[int], list[int], tuple[Key, ...]]:
        """The places of parameters, and of those with only a norm, that the user asked for, and their keys. Steps rarely differ."""
        wanted = self._context.wanted
        keep, keep_given = ([i for i, name in enumerate(names) if wanted(name)] for names in (sites, given))
        keys = self._full.keys(tuple(sites[i] for i in keep))
        return keep, keep_given, keys + self._short.keys(tuple(given[i] for i in keep_given))

    def companions(self, gathered: Gathered, numbers: Mapping[str, float]) -> dict[str, float]:
        """The norm over all parameters."""
        return {GRADIENT_NORM: _global_norm(gathered)}

    def detach(self) -> None:
        """Nothing was attached."""


def local_part(gradient: Tensor) -> tuple[Tensor, bool]:
    """This rank's part of a gradient, and whether other ranks hold other parts.

    Of a DTensor replicated over some dimensions of its mesh, only the first copy counts.
    """
    if not is_dtensor(gradient):
        return gradient, False
    sharded: Any = gradient
    coordinate = sharded.device_mesh.get_coordinate()
    local: Tensor = sharded.to_local()
    copies = [
        at
        for at, placement in zip(coordinate or (), sharded.placements, strict=True)
        if placement.is_replicate()
    ]
    return (local.new_empty(0) if any(copies) else local), True


def statistics(gathered: Gathered) -> tuple[power_sums.Array, power_sums.Array]:
    """The table's statistics [parameters, STATISTICS], and (l2, share) [norms, 2] for those with only a norm."""
    rows = gathered.rows() if gathered.sites else np.empty((0, len(FIELDS)))
    norms, scale = np.array(list(gathered.extra.values()), dtype=np.float64), gathered.scale
    column = {field: rows[:, i] for field, i in COLUMN.items()}
    count = column["count"]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        l2 = np.sqrt(column["s2"]) / scale
        square = np.sum(l2**2) + np.sum(norms**2)
        full = [
            l2,
            column["absmax"] / scale,
            power_sums.mean(count, column["s1"]) / scale,
            np.sqrt(power_sums.variance(count, column["s1"], column["s2"])) / scale,
            column["zero"] / count,
            column["subnormal"] / count,
            column["nonfinite"] / count,
            l2**2 / square if square != 0 else np.zeros_like(l2),
        ]
        short = [norms, norms**2 / square if square != 0 else np.zeros_like(norms)]
    return np.stack(full, axis=1), np.stack(short, axis=1)


def _global_norm(gathered: Gathered) -> float:
    """The norm over all parameters."""
    squares = float(gathered.rows()[:, COLUMN["s2"]].sum()) if gathered.sites else 0.0
    return math.sqrt(squares / gathered.scale**2 + sum(norm**2 for norm in gathered.extra.values()))

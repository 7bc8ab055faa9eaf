"""Gradients of every parameter: how large, how spread, how much of the whole, and whether the format still
holds them.

Read where the gradient is final: reduced over ranks, unscaled, not yet clipped. A parameter without a
gradient (frozen, unused) has no row; a parameter under several names (tied) is counted once, under its first
name. Of a parameter whose trainer hands over the norm alone, L2 and share are recorded.

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

``subnormal_fraction`` is of the gradient as stored, that is with the loss scale in it if it still is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from stabilitylab.probes.base import Context, Found, KeyTable, Readings
from stabilitylab.statistics import moments
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.statistics.summary import COLUMN, FIELDS, Summary, add_all, measurable

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


class GradientProbe:
    """Statistics of every parameter's gradient; see the module's docstring."""

    name = "gradients"

    def __init__(self) -> None:
        self._summaries: dict[str, Summary] = {}
        self._full = KeyTable("gradient", STATISTICS)
        self._short = KeyTable("gradient", ("l2", "share"))
        self._norms: dict[str, float] = {}
        self._scale: float | Slots = 1.0
        # The parameters of this step in the order in which the backward pass came to them.
        self.order: list[tuple[str, Summary]] = []

    def attach(self, context: Context) -> None:
        """Nothing is hooked: the monitor hands the gradients over."""
        self._context = context

    def arm(self, measured: bool) -> None:
        """Forget the last step."""
        self._norms = {}
        self.order = []

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float | Slots
    ) -> None:
        """Summarise all gradients, each in its own slots, in one call."""
        self._scale = scale
        pairs = []
        for name, gradient in gradients.items():
            gradient, sharded = local_part(gradient)
            if measurable(gradient):
                summary = self._summaries.get(name)
                if summary is None:
                    sharded = sharded or any(fnmatchcase(name, glob) for glob in self._context.sharded)
                    region = "rows" if sharded else "replicated"
                    summary = self._summaries[name] = Summary(self._context.buffer, region=region)
                if summary.row is not None:
                    summary.row.stamp = (
                        -1
                    )  # read again in the same step, gradients replace what was read before
                pairs.append((summary, gradient))
        add_all(pairs)
        # The backward pass comes to the parameters from the last to the first.
        self.order = [
            (name, self._summaries[name]) for name in reversed(list(gradients)) if name in self._summaries
        ]
        self._norms = {name: float(norm) for name, norm in norms.items() if name not in gradients}

    def collect(self) -> Found | None:
        """Every parameter that had a gradient."""
        seen = [(name, s.row) for name, s in self._summaries.items() if s.seen]
        if not seen and not self._norms:
            return None
        return Found(
            sites=tuple(name for name, _ in seen),
            slots=[(row,) for _, row in seen],
            scale=self._scale,
            extra=self._norms,
        )

    def finish(self, gathered: Gathered) -> Readings:
        """The table's statistics, of the parameters that the user asked for."""
        norms, wanted = gathered.extra, self._context.wanted
        full, short = statistics(gathered)
        keep = [i for i, name in enumerate(gathered.sites) if wanted(name)]
        keep_given = [i for i, name in enumerate(norms) if wanted(name)]
        keys = self._full.keys(tuple(gathered.sites[i] for i in keep))
        if keep_given:
            keys += self._short.keys(tuple(list(norms)[i] for i in keep_given))
        return Readings(keys, np.concatenate([full[keep].ravel(), short[keep_given].ravel()]))

    def detach(self) -> None:
        """Nothing was attached."""


def local_part(gradient: Tensor) -> tuple[Tensor, bool]:
    """This rank's part of a gradient, and whether other ranks hold other parts.

    Of a DTensor that is copied over some dimensions of its mesh, the first copy counts: the others give
    nothing.
    """
    if not dist.is_available() or not isinstance(gradient, DTensor):
        return gradient, False
    coordinate = gradient.device_mesh.get_coordinate()
    local = gradient.to_local()
    copies = [
        at
        for at, placement in zip(coordinate or (), gradient.placements, strict=True)
        if placement.is_replicate()
    ]
    return (local.new_empty(0) if any(copies) else local), True


def global_norm(gathered: Gathered) -> float:
    """The norm over all parameters."""
    squares = sum(numbers[0][COLUMN["s2"]] for numbers in gathered.numbers if numbers[0] is not None)
    return math.sqrt(squares / gathered.scale**2 + sum(norm**2 for norm in gathered.extra.values()))


def statistics(gathered: Gathered) -> tuple[moments.Array, moments.Array]:
    """The table's statistics [parameters, STATISTICS], and (l2, share) [norms, 2] of those with a norm
    alone."""
    rows = gathered.rows().reshape(-1, len(FIELDS))
    norms, scale = np.array(list(gathered.extra.values()), dtype=np.float64), gathered.scale
    column = {field: rows[:, i] for field, i in COLUMN.items()}
    count = column["count"]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        l2 = np.sqrt(column["s2"]) / scale
        square = np.sum(l2**2) + np.sum(norms**2)
        full = [
            l2,
            column["absmax"] / scale,
            moments.mean(count, column["s1"]) / scale,
            np.sqrt(moments.variance(count, column["s1"], column["s2"])) / scale,
            column["zero"] / count,
            column["subnormal"] / count,
            column["nonfinite"] / count,
            l2**2 / square if square != 0 else np.zeros_like(l2),
        ]
        short = [norms, norms**2 / square if square != 0 else np.zeros_like(norms)]
    return np.stack(full, axis=1), np.stack(short, axis=1)

"""Gradients of every parameter: how large, how spread, how much of the whole, and whether the format still
holds them.

Read where the gradient is final: reduced over ranks, unscaled, not yet clipped. A parameter without a
gradient (frozen, unused) has no row; a parameter under several names (tied) is counted once, under its first
name.

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
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from stabilitylab.probes.base import Context, Readings
from stabilitylab.statistics import moments
from stabilitylab.statistics.buffer import Block
from stabilitylab.statistics.summary import COLUMN, FIELDS, SUMS, measurable, summarise
from stabilitylab.telemetry import Key

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
        self._blocks: dict[str, Block] = {}
        self._keys: dict[tuple[tuple[str, ...], ...], tuple[Key, ...]] = {}
        self._norms: dict[str, float] = {}
        self._scale = 1.0
        self.global_norm = float("nan")

    def attach(self, context: Context) -> None:
        """Nothing is hooked: the monitor hands the gradients over."""
        self._context = context

    def arm(self, measured: bool) -> None:
        """Forget the last step's norms."""
        self._norms = {}

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float
    ) -> None:
        """Summarise each gradient into its block."""
        buffer = self._context.buffer
        self._scale = scale
        for name, gradient in gradients.items():
            if not measurable(gradient):
                continue
            block = self._blocks.get(name)
            if block is None or block.device != gradient.device:
                block = self._blocks[name] = buffer.reserve(len(FIELDS), len(SUMS), gradient.device)
            block.stamp = -1
            buffer.put(block, summarise(gradient))
        self._norms = {name: float(norm) for name, norm in norms.items() if name not in gradients}

    def read(self) -> Readings:
        """The table's statistics of every parameter that had a gradient."""
        buffer, scale = self._context.buffer, self._scale
        seen = [name for name, block in self._blocks.items() if buffer.seen(block)]
        rows = np.array([buffer.host(self._blocks[name]) for name in seen]).reshape(len(seen), len(FIELDS))
        column = {field: rows[:, i] for field, i in COLUMN.items()}
        given = np.array(list(self._norms.values()), dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            l2 = np.sqrt(column["s2"]) / scale
            square = np.sum(l2**2) + np.sum(given**2)
            self.global_norm = float(np.sqrt(square))
            full = np.stack(
                [
                    l2,
                    np.maximum(column["maximum"], column["negative"]) / scale,
                    moments.mean(column["count"], column["s1"]) / scale,
                    np.sqrt(moments.variance(column["count"], column["s1"], column["s2"])) / scale,
                    column["zero"] / column["count"],
                    column["subnormal"] / column["count"],
                    column["nonfinite"] / column["count"],
                    l2**2 / square if square != 0 else np.zeros_like(l2),
                ],
                axis=1,
            )
            short = np.stack([given, given**2 / square if square != 0 else np.zeros_like(given)], axis=1)
        keep = [i for i, name in enumerate(seen) if self._context.wanted(name)]
        keep_given = [i for i, name in enumerate(self._norms) if self._context.wanted(name)]
        names = (tuple(seen[i] for i in keep), tuple(list(self._norms)[i] for i in keep_given))
        keys = self._keys.get(names)
        if keys is None:
            keys = tuple(
                Key("gradient", name, statistic)
                for group, statistics in zip(names, (STATISTICS, ("l2", "share")), strict=True)
                for name in group
                for statistic in statistics
            )
            self._keys = {names: keys}
        return Readings(keys, np.concatenate([full[keep].ravel(), short[keep_given].ravel()]))

    def detach(self) -> None:
        """Nothing was attached."""

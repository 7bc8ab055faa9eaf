"""Activations: inputs and outputs of linear and norm layers, and the main branch after every block.

Seen through forward hooks that exist only while a step is measured. A site is a module's output under the
module's path, or the input of a linear or norm layer under ``<path>:input``. Where a module returns several
tensors the first floating-point one counts. The same tensor met again (a norm's output is the next layer's
input) is summarised once and reported under both names.

Counted are forward passes in training mode or with gradients on; the second forward pass of activation
recomputation runs inside the backward pass and is left out. Micro-batches of one step merge.

Family ``activation``, site = module path or ``<path>:input``:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| absmax | largest magnitude; NaN if any element is | activation | definition |
| rms | root mean square | activation | definition |
| mean | arithmetic mean | activation | definition |
| kurtosis | m4 / m2^2 over all elements (Gaussian: 3) | 1 | Pearson; Bondarenko et al., arXiv:2306.12929 |
| outlier_fraction | share of elements with abs(x) >= 6 | 1 | LLM.int8(), arXiv:2208.07339, section 3.1 |
| fp16_headroom_bits | log2(65504 / absmax) | bit | formats.py |
| nonfinite_fraction | share of NaN and infinite elements | 1 | IEEE 754-2019, 3.4 |
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabilitylab.probes.base import NOTHING, Context, Readings
from stabilitylab.probes.sites import blocks, is_linear, is_norm, tensor_in
from stabilitylab.statistics import moments
from stabilitylab.statistics.buffer import Block
from stabilitylab.statistics.formats import headroom_bits
from stabilitylab.statistics.summary import COLUMN, FIELDS, SUMS, summarise
from stabilitylab.telemetry import Key

STATISTICS = (
    "absmax",
    "rms",
    "mean",
    "kurtosis",
    "outlier_fraction",
    "fp16_headroom_bits",
    "nonfinite_fraction",
)


class _Site:
    """One tensor in the forward pass, and where its summary lies."""

    __slots__ = ("alias", "block", "fixed", "path", "stamp")

    def __init__(self, path: str) -> None:
        self.path = path
        self.block: Block | None = None
        self.alias: _Site | None = None
        self.stamp = -1


class ActivationProbe:
    """Statistics of activations; see the module's docstring."""

    name = "activations"

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._sites: list[_Site] = []
        self._hooked: list[tuple[nn.Module, _Site | None, _Site | None]] = []
        self._keys: dict[tuple[str, ...], tuple[Key, ...]] = {}
        # The tensors summarised in this step, by id, so that the same one is not summarised twice.
        self._known: dict[int, tuple[weakref.ref[Tensor], int, _Site]] = {}

    def attach(self, context: Context) -> None:
        """Choose the sites; a module shared under several names is watched under the first."""
        self._context = context
        main_branch = {id(block): path for path, block in blocks(context.model).items()}
        for path, module in context.model.named_modules():
            layer = is_linear(module) or is_norm(module)
            inside = _Site(f"{path}:input") if layer and context.wanted(f"{path}:input") else None
            out = _Site(path) if (layer or id(module) in main_branch) and context.wanted(path) else None
            if inside is not None or out is not None:
                self._hooked.append((module, inside, out))
                self._sites += [site for site in (inside, out) if site is not None]

    def arm(self, measured: bool) -> None:
        """Put the hooks in place, or take them away."""
        self._known.clear()
        if measured == bool(self._handles):
            return
        if not measured:
            self.detach()
            return
        for module, inside, out in self._hooked:
            self._handles.append(module.register_forward_hook(self._hook(inside, out), with_kwargs=True))

    def _hook(self, inside: _Site | None, out: _Site | None) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1 or not (module.training or torch.is_grad_enabled()):
                return
            if inside is not None:
                self._observe(inside, tensor_in(args) if args else tensor_in(kwargs))
            if out is not None:
                self._observe(out, tensor_in(output))

        return hook

    def _observe(self, site: _Site, x: Tensor | None) -> None:
        if x is None:
            return
        known = self._known.get(id(x))
        if known is not None and known[0]() is x and known[1] == x._version:
            site.alias = known[2]
            return
        buffer = self._context.buffer
        if site.block is None or site.block.device != x.device:
            site.block = buffer.reserve(len(FIELDS), len(SUMS), x.device)
        site.alias = None
        buffer.put(site.block, summarise(x))
        self._known[id(x)] = (weakref.ref(x), x._version, site)

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float
    ) -> None:
        """Not this probe's business."""

    def read(self) -> Readings:
        """The table's statistics of every site that the step's forward passes reached."""
        buffer = self._context.buffer
        rows, paths = [], []
        for site in self._sites:
            block = (site.alias or site).block
            if block is not None and buffer.seen(block):
                rows.append(buffer.host(block))
                paths.append(site.path)
        if not rows:
            return NOTHING
        table = np.stack(rows)
        column = {field: table[:, i] for field, i in COLUMN.items()}
        count = column["count"]
        absmax = np.maximum(column["maximum"], column["negative"])
        values = np.stack(
            [
                absmax,
                moments.rms(count, column["s2"]),
                moments.mean(count, column["s1"]),
                moments.kurtosis(count, column["s1"], column["s2"], column["s3"], column["s4"]),
                column["over_6"] / count,
                headroom_bits(absmax),
                column["nonfinite"] / count,
            ],
            axis=1,
        )
        names = tuple(paths)
        keys = self._keys.get(names)
        if keys is None:
            keys = tuple(Key("activation", path, statistic) for path in names for statistic in STATISTICS)
            self._keys = {names: keys}
        return Readings(keys, values.ravel())

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

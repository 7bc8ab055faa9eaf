"""Gradients with respect to activations: how the error signal fares on its way down, and where a format loses
it.

A hook on the output tensor of every linear and norm layer and every block sees the gradient when the backward
pass has summed it up. The hook looks and returns nothing, so the gradient is passed on untouched. Under
activation recomputation the graph through which the backward pass goes is the one whose hook fires, once.

Family ``activation_gradient``, site = module path:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| absmax | largest magnitude; NaN if any element is | loss/activation | definition |
| rms | root mean square | loss/activation | definition |
| kurtosis | m4 / m2^2 over all elements (Gaussian: 3) | 1 | Pearson |
| zero_fraction | share of elements equal to 0 | 1 | definition |
| subnormal_fraction | share below the format's smallest normal number, not 0 | 1 | IEEE 754-2019, 3.4 |
| fp16_underflow_fraction | share of nonzero elements that fp16 rounds to 0: abs(x) <= 2^-25 | 1 | arXiv:1710.03740, 3.2 |
| fp16_headroom_bits | log2(65504 / absmax), loss scale included | bit | formats.py |
| nonfinite_fraction | share of NaN and infinite elements | 1 | IEEE 754-2019, 3.4 |

``absmax`` and ``rms`` are of the true gradient, with the loss scale divided out; the shares and the headroom
are of the gradient as the format has to hold it, with the loss scale in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabilitylab.compat import DisableTorchFunction
from stabilitylab.probes.base import Context, Found, KeyTable, Readings
from stabilitylab.probes.compiled import WatchGradient, register, unregister
from stabilitylab.probes.hooks import Hook
from stabilitylab.probes.sites import tensor_in, watched
from stabilitylab.statistics import formats, moments
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.statistics.summary import COLUMN, Summary, measurable

STATISTICS = (
    "absmax",
    "rms",
    "kurtosis",
    "zero_fraction",
    "subnormal_fraction",
    "fp16_underflow_fraction",
    "fp16_headroom_bits",
    "nonfinite_fraction",
)


class ActivationGradientProbe:
    """Statistics of gradients with respect to activations; see the module's docstring."""

    name = "activation_gradients"

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._sites: dict[str, tuple[nn.Module, Summary]] = {}
        self._armed = False
        self._states: list[Tensor] = []
        self._keys = KeyTable("activation_gradient", STATISTICS)
        # The sites of this step in the order in which the backward pass came to them.
        self.order: list[tuple[str, Summary]] = []

    def attach(self, context: Context) -> None:
        """Choose the sites."""
        self._context = context
        for path, module, _ in watched(context.model):
            if context.wanted(path):
                self._sites[path] = (module, Summary(context.buffer))

    def arm(self, measured: bool) -> None:
        """Put the hooks in place, or take them away."""
        self.order = []
        self._armed = measured
        self._context.follow_compiler()
        wanted = measured or self._context.compiled
        if wanted == bool(self._handles):
            return
        if not wanted:
            self.detach()
            return
        for path, (module, summary) in self._sites.items():
            watcher = self._context.guarded(self.name, self._watcher(path, summary))
            self._states.append(register(watcher))
            eager = self._context.guarded(self.name, self._hook(watcher))
            hook = traceable(self._context, eager, self._states[-1])
            self._handles.append(module.register_forward_hook(Hook(hook)))

    def _watcher(self, path: str, summary: Summary) -> Callable[[Tensor], None]:
        def watch(gradient: Tensor) -> None:
            if self._armed and measurable(gradient):
                if not summary.seen:
                    self.order.append((path, summary))
                summary.add(gradient)

        return watch

    def _hook(self, watcher: Callable[[Tensor], None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._armed:
                with DisableTorchFunction():
                    x = tensor_in(output)
                    # A leaf, such as a parameter handed on, would keep the hook.
                    if x is not None and x.requires_grad and not x.is_leaf:
                        x.register_hook(watcher)  # type: ignore[no-untyped-call]

        return hook

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float | Slots
    ) -> None:
        """Not this probe's business."""

    def collect(self) -> Found | None:
        """Every site that the step's backward passes reached."""
        seen = [(path, s.row) for path, (_, s) in self._sites.items() if s.seen]
        if not seen:
            return None
        return Found(
            sites=tuple(path for path, _ in seen),
            slots=[(row,) for _, row in seen],
            scale=self._context.loss_scale,
        )

    def finish(self, gathered: Gathered) -> Readings:
        """The table's statistics."""
        rows, scale = gathered.rows(), gathered.scale
        column = {field: rows[:, i] for field, i in COLUMN.items()}
        count = column["count"]
        with np.errstate(divide="ignore", invalid="ignore"):
            values = [
                column["absmax"] / scale,
                moments.rms(count, column["s2"]) / scale,
                moments.kurtosis(count, *(column[f"s{k}"] for k in (1, 2, 3, 4))),
                column["zero"] / count,
                column["subnormal"] / count,
                column["fp16_lost"] / (count - column["zero"]),
                formats.headroom_bits(column["absmax"]),
                column["nonfinite"] / count,
            ]
        return Readings(self._keys.keys(gathered.sites), np.stack(values, axis=1).ravel())

    def detach(self) -> None:
        """Remove the hooks; those on tensors of a graph still alive, or compiled, see nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for state in self._states:
            unregister(state)
        self._states.clear()
        self._armed = False


def traceable(context: Context, eager: Callable[..., None], state: Tensor) -> Callable[..., Any]:
    """A forward hook that runs ``eager``, or where it is traced puts a ``WatchGradient`` behind the module's
    output.

    Only a tensor returned by itself can be replaced by its twin; other outputs are left alone.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not torch.compiler.is_compiling():
            return eager(module, args, output)
        if not context.compiled:
            context.traced = True
        elif isinstance(output, Tensor) and measurable(output) and torch.is_grad_enabled():
            return WatchGradient.apply(output, state)  # type: ignore[no-untyped-call]
        return None

    return hook

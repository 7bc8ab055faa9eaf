"""Gradients with respect to activations: how large they are along the backward pass, and where a format loses them.

A hook on the output tensor of every linear and norm layer, embedding and block sees the gradient when the backward pass has summed
it up. The hook returns nothing, so it leaves the gradient as it is. Under activation recomputation only the hook in the recomputed
graph fires, once, since the backward pass goes through that graph.

Family ``activation_gradient``, site = module path:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| absmax | largest magnitude; NaN if any element is | loss/activation | definition |
| rms | root mean square | loss/activation | definition |
| kurtosis | m4 / m2^2 over all elements (Gaussian: 3) | 1 | Pearson |
| zero_fraction | share of elements equal to 0 | 1 | definition |
| subnormal_fraction | share below the format's smallest normal number, not 0 | 1 | IEEE 754-2019, 3.4 |
| fp16_underflow_fraction | share of nonzero elements that fp16 rounds to 0: abs(x) <= 2^-25 | 1 | arXiv:1710.03740, 3.2 |
| fp16_headroom_bits | log2(65504 / absmax), loss scale included | bit | headroom.py |
| nonfinite_fraction | share of NaN and infinite elements | 1 | IEEE 754-2019, 3.4 |

``absmax`` and ``rms`` describe the true gradient, with the loss scale divided out; the shares and the headroom describe the
gradient that the format has to hold, with the loss scale in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabilitylab.compat import DisableTorchFunction
from stabilitylab.probes.base import Found, KeyTable, Readings
from stabilitylab.probes.compiled import WatchGradient
from stabilitylab.probes.hooking import Function, HookingProbe
from stabilitylab.probes.sites import tensor_in, watched
from stabilitylab.statistics import headroom, power_sums
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


class ActivationGradientProbe(HookingProbe):
    """Statistics of gradients with respect to activations; see the module's docstring."""

    name = "activation_gradients"

    def __init__(self) -> None:
        super().__init__()
        self._sites: dict[str, tuple[nn.Module, Summary]] = {}
        self._keys = KeyTable("activation_gradient", STATISTICS)
        # This step's sites, in the order of the backward pass.
        self.order: list[tuple[str, Summary]] = []

    def _find(self) -> None:
        context = self._context
        for path, module, _ in watched(context.model):
            if context.wanted(path):
                self._sites[path] = (module, Summary(context.buffer))

    def _begin(self, measured: bool) -> None:
        self.order = []

    def _hook(self) -> None:
        for path, (module, summary) in self._sites.items():
            watcher = self._guarded(self._watcher(path, summary))
            eager = self._guarded(self._look(watcher))
            self._after_forward(module, self._traceable(eager, twin(self._state(watcher))))

    def _watcher(self, path: str, summary: Summary) -> Callable[[Tensor], None]:
        def watch(gradient: Tensor) -> None:
            if self._armed and measurable(gradient):
                if not summary.seen:
                    self.order.append((path, summary))
                summary.add(gradient)

        return watch

    def _look(self, watcher: Callable[[Tensor], None]) -> Function:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._armed:
                with DisableTorchFunction():
                    x = tensor_in(output)
                    # A leaf, such as a parameter passed on, would keep the hook.
                    if x is not None and x.requires_grad and not x.is_leaf:
                        x.register_hook(watcher)  # type: ignore[no-untyped-call]

        return hook

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
                power_sums.rms(count, column["s2"]) / scale,
                power_sums.kurtosis(count, *(column[f"s{k}"] for k in (1, 2, 3, 4))),
                column["zero"] / count,
                column["subnormal"] / count,
                column["fp16_lost"] / (count - column["zero"]),
                headroom.headroom_bits(column["absmax"]),
                column["nonfinite"] / count,
            ]
        return Readings(self._keys.keys(gathered.sites), np.stack(values, axis=1).ravel())


def twin(state: Tensor) -> Function:
    """A forward hook for the compiler to trace: it puts a ``WatchGradient`` behind the module's output.

    It works on outputs that are a single tensor, and leaves other outputs alone.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and measurable(output) and torch.is_grad_enabled():
            return WatchGradient.apply(output, state)  # type: ignore[no-untyped-call]
        return None

    return hook

"""Activations: inputs and outputs of linear and norm layers, outputs of embeddings, and the residual stream after every block.

Forward hooks see them, and exist only while a step is measured. A site is a module's output under the module's path, or the input
of a linear or norm layer under ``<path>:input``. Where a module returns several tensors the first floating-point one counts. A
tensor seen twice (a norm's output is the next layer's input) is summarised once and reported under both names. The last dimension
holds the channels.

The probe counts forward passes in training mode or with gradients enabled; it ignores the second forward pass of activation
recomputation, which runs inside the backward pass. It combines the micro-batches of a step.

Family ``activation``, site = module path or ``<path>:input``:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| absmax | largest magnitude; NaN if any element is | activation | definition |
| rms | root mean square | activation | definition |
| mean | arithmetic mean | activation | definition |
| kurtosis | m4 / m2^2 over all elements (Gaussian: 3) | 1 | Pearson; Bondarenko et al., arXiv:2306.12929 |
| channel_kurtosis | mean(s^4)/mean(s^2)^2 over channels, s = RMS of a channel | 1 | He et al., arXiv:2405.19279 |
| channel_max_over_median | largest channel maximum / median channel maximum | 1 | SmoothQuant, arXiv:2211.10438 |
| quantile_1e-3 | magnitude that one element in 1e3 exceeds; off by at most one bin (12.5 %) | activation | tails.py |
| quantile_1e-4 | the same of one in 1e4 | activation | tails.py |
| quantile_1e-5 | the same of one in 1e5 | activation | tails.py |
| quantile_1e-6 | the same of one in 1e6 (the maximum, where there are fewer elements) | activation | tails.py |
| outlier_fraction | share of elements with abs(x) >= 6 | 1 | LLM.int8(), arXiv:2208.07339, section 3.1 |
| outlier_6rms_fraction | share with abs(x) >= 6 RMS of its micro-batch | 1 | Bondarenko et al., arXiv:2109.12948 |
| massive_fraction | share with abs(x) > 100 and >= 1,000 median magnitudes (of 2,048 sampled elements) | 1 | arXiv:2402.17762 |
| fp16_headroom_bits | log2(65504 / absmax) | bit | headroom.py |
| fp8_e4m3_headroom_bits | log2(448 / absmax) | bit | headroom.py |
| fp8_e5m2_headroom_bits | log2(57344 / absmax) | bit | headroom.py |
| fp16_underflow_fraction | share of nonzero elements that fp16 rounds to 0: abs(x) <= 2^-25 | 1 | headroom.py |
| fp8_underflow_fraction | share of nonzero elements that E4M3 rounds to 0, unscaled: abs(x) <= 2^-10 | 1 | headroom.py |
| zero_fraction | share of elements equal to 0 | 1 | definition |
| nonfinite_fraction | share of NaN and infinite elements | 1 | IEEE 754-2019, 3.4 |
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabilitylab.compat import DisableTorchFunction
from stabilitylab.probes.base import Found, KeyTable, Readings
from stabilitylab.probes.compiled import observe
from stabilitylab.probes.hooking import Function, HookingProbe
from stabilitylab.probes.sites import counts, tensor_in, watched
from stabilitylab.statistics import headroom, power_sums
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered, Numbers
from stabilitylab.statistics.summary import COLUMN, Summary, measurable
from stabilitylab.statistics.tails import channel_kurtosis, max_over_median, tail_quantiles

STATISTICS = (
    "absmax",
    "rms",
    "mean",
    "kurtosis",
    "channel_kurtosis",
    "channel_max_over_median",
    "quantile_1e-3",
    "quantile_1e-4",
    "quantile_1e-5",
    "quantile_1e-6",
    "outlier_fraction",
    "outlier_6rms_fraction",
    "massive_fraction",
    "fp16_headroom_bits",
    "fp8_e4m3_headroom_bits",
    "fp8_e5m2_headroom_bits",
    "fp16_underflow_fraction",
    "fp8_underflow_fraction",
    "zero_fraction",
    "nonfinite_fraction",
)


class SummarizedTensor:
    """One tensor of the forward pass, its summary, and the site whose summary it shares if it is the same tensor.

    ``alias`` holds for one step, whose first forward pass finds it. A later micro-batch that contradicts it makes the site invalid
    for that step (``broken``), since the first one went into no summary of the site's own; from the next step on it has one.
    """

    __slots__ = ("alias", "broken", "own_only", "path", "stamp", "summary")

    def __init__(self, path: str, summary: Summary) -> None:
        self.path = path
        self.summary = summary
        self.alias: SummarizedTensor | None = None
        self.stamp = -1
        self.broken = False
        self.own_only = False


class ActivationProbe(HookingProbe):
    """Statistics of activations; see the module's docstring."""

    name = "activations"

    def __init__(self) -> None:
        super().__init__()
        self._sites: list[SummarizedTensor] = []
        self._hooked: list[tuple[nn.Module, SummarizedTensor | None, SummarizedTensor | None]] = []
        self._keys = KeyTable("activation", STATISTICS)
        # The tensors summarised in this step, by id, so that none is summarised twice.
        self._known: dict[int, tuple[weakref.ref[Tensor], int, SummarizedTensor]] = {}
        # This step's summaries, in the order of the forward pass.
        self.order: list[tuple[str, Summary]] = []

    def _find(self) -> None:
        # Watch a module shared under several names under the first.
        context = self._context
        for path, module, layer in watched(context.model):
            inside = self._site(f"{path}:input") if layer and context.wanted(f"{path}:input") else None
            out = self._site(path) if context.wanted(path) else None
            if inside is not None or out is not None:
                self._hooked.append((module, inside, out))

    def _site(self, path: str) -> SummarizedTensor:
        self._sites.append(SummarizedTensor(path, Summary(self._context.buffer, full=True)))
        return self._sites[-1]

    def _begin(self, measured: bool) -> None:
        self._known.clear()
        self.order = []

    def _hook(self) -> None:
        for module, inside, out in self._hooked:
            states = self._state_of(inside), self._state_of(out)
            hook = self._traceable(self._guarded(self._look(inside, out)), operators(*states))
            self._after_forward(module, hook, with_kwargs=True)

    def _state_of(self, site: SummarizedTensor | None) -> Tensor | None:
        if site is None:
            return None

        def watcher(x: Tensor) -> None:
            if self._armed and measurable(x):
                self._observe(site, x)

        return self._state(self._guarded(watcher))

    def _look(self, inside: SummarizedTensor | None, out: SummarizedTensor | None) -> Function:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self._armed or not counts(module):
                return
            # The modes that the user or another probe has set must not see the operations of this probe.
            with DisableTorchFunction():
                if inside is not None:
                    x = tensor_in(args) if args else tensor_in(kwargs)
                    if x is not None:
                        self._observe(inside, x)
                if out is not None:
                    x = tensor_in(output)
                    if x is not None:
                        self._observe(out, x)

        return hook

    def _observe(self, site: SummarizedTensor, x: Tensor) -> None:
        stamp = self._context.buffer.stamp
        self._context.passed(site.path)
        known = self._known.get(id(x))
        same = known[2] if known is not None and known[0]() is x and known[1] == x._version else None
        if site.stamp != stamp:
            site.stamp, site.broken = stamp, False
            site.alias = None if site.own_only or same is site else same
        elif site.alias is not None and site.alias is not same:
            site.broken = site.own_only = True
        if site.alias is not None:
            return
        if not site.summary.seen:
            self.order.append((site.path, site.summary))
        site.summary.add(x)
        self._known[id(x)] = (weakref.ref(x), x._version, site)

    def collect(self) -> Found | None:
        """Every site that the step's forward passes reached."""
        stamp = self._context.buffer.stamp
        seen = [
            (site.path, (site.alias or site).summary)
            for site in self._sites
            if site.stamp == stamp and not site.broken
        ]
        if not seen:
            return None
        slots: list[tuple[Slots | None, ...]] = [(s.row, s.bits, s.squares, s.tail) for _, s in seen]
        return Found(sites=tuple(path for path, _ in seen), slots=slots)

    def finish(self, gathered: Gathered) -> Readings:
        """The table's statistics."""
        return Readings(self._keys.keys(gathered.sites), statistics(gathered.numbers).ravel())


def operators(inside: Tensor | None, out: Tensor | None) -> Function:
    """A forward hook for the compiler to trace: it leaves operators behind for the sites."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module.training or torch.is_grad_enabled():
            if inside is not None:
                x = tensor_in(args) if args else tensor_in(kwargs)
                if x is not None:
                    observe(x, inside)
            if out is not None:
                x = tensor_in(output)
                if x is not None:
                    observe(x, out)

    return hook


def statistics(numbers: Sequence[Numbers]) -> power_sums.Array:
    """The table's statistics, [sites, STATISTICS].

    Args:
        numbers: row, bits, squares and tail of each site; bits and squares may be None.
    """
    rows = np.array([row for row, *_ in numbers], dtype=np.float64)
    column = {field: rows[:, i] for field, i in COLUMN.items()}
    count, absmax = column["count"], column["absmax"]
    tail = np.array([tail for *_, tail in numbers])
    spread = np.full((len(numbers), 2), np.nan)
    widths: dict[int, list[int]] = {}
    for i, (_, bits, squares, _) in enumerate(numbers):
        if bits is not None and squares is not None:
            widths.setdefault(len(bits), []).append(i)
    for of_width in widths.values():
        bits_SC = np.array([numbers[i][1] for i in of_width], dtype=np.int32)
        square_SC = np.array([numbers[i][2] for i in of_width], dtype=np.float64)
        spread[of_width, 0] = channel_kurtosis(square_SC)
        spread[of_width, 1] = max_over_median(bits_SC.view(np.float32).astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.column_stack(
            [
                absmax,
                power_sums.rms(count, column["s2"]),
                power_sums.mean(count, column["s1"]),
                power_sums.kurtosis(count, *(column[f"s{k}"] for k in (1, 2, 3, 4))),
                spread,
                tail_quantiles(tail, count, absmax, column["tail_from"]),
                column["over_6"] / count,
                column["over_6rms"] / count,
                column["massive"] / count,
                headroom.headroom_bits(absmax, headroom.FP16_MAX),
                headroom.headroom_bits(absmax, headroom.FP8_E4M3_MAX),
                headroom.headroom_bits(absmax, headroom.FP8_E5M2_MAX),
                column["fp16_lost"] / (count - column["zero"]),
                column["fp8_lost"] / (count - column["zero"]),
                column["zero"] / count,
                column["nonfinite"] / count,
            ]
        )

"""Attention scores, per head, whether they are materialised or never leave a fused kernel.

*Fused*: the kernel behind ``scaled_dot_product_attention`` returns the log-sum-exp of every row, since its backward pass needs it.
The probe reads it off the kernel's own return value in any model that calls the function: the same kernel runs, its result is
untouched, and nothing forms a second product Q K'; ``statistics.scores`` says what follows from it. Where PyTorch falls back to its
unfused path, the probe takes the exact scores from the softmax there.

*Materialised*: the probe takes the argument [B, H, T, S] of a softmax over the last dimension that a module of the model calls, and
[B * H, T, S] where the module gives H by ``num_heads`` or the like, or has attention in its class name (then H = 1). The first
number of heads that a module shows has the module's site, any further number H the site ``path:H``. A model may declare which
scores count, with a module whose output is the score tensor before the softmax, by default one named ``scores``: its parent is the
site, and the probe ignores the parent's softmaxes.

It does not see attention that uses neither path (flex_attention, kernels of other packages, attention without a softmax). It warns
once about every class with attention in its name that ran in the first measured pass without showing scores.

Under ``torch.compile`` it sees softmaxes of four dimensions, and fused attention on CPUs where the flash kernel takes the call (no
dropout, as many key heads as query heads); it does not see other compiled fused attention (``attention_calls``).

Family ``attention``, site = the attention module's path, index = head:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| score_max | largest score; fused: an upper bound, too large by at most log S, and by less near 0 | score | scores.py |
| score_max_sampled | exact maximum of the sampled rows: equal to score_max where that is exact | score | scores.py |
| score_min | smallest unmasked score; fused: of the sampled rows | score | scores.py |
| entropy | mean entropy of the attention weights of sampled rows | nat | Zhai et al., arXiv:2303.06296 |
| fp16_headroom_bits | log2(65504 / max(abs(score_max), abs(score_min))) | bit | headroom.py |
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabilitylab.compat import DisableTorchFunction, in_backward
from stabilitylab.model_structure import blocks, named_modules
from stabilitylab.probes.attention_calls import Calls, Kernel, Running, Shown, by_head
from stabilitylab.probes.base import Found, Readings
from stabilitylab.probes.compiled import observe
from stabilitylab.probes.hooking import HookingProbe
from stabilitylab.probes.sites import counts
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.statistics.headroom import headroom_bits
from stabilitylab.statistics.scores import ScoreRanges, fused, materialised
from stabilitylab.statistics.summary import measurable
from stabilitylab.telemetry import Key

STATISTICS = ("score_max", "score_max_sampled", "score_min", "entropy", "fp16_headroom_bits")


_log = logging.getLogger("stabilitylab")
SIZES = 4  # the most different numbers of heads to record of one module


class _HeadSlots:
    """A site's slots, one per head: written together, read apart."""

    def __init__(self, maxima: Slots, sums: Slots) -> None:
        self.maxima, self.sums = maxima, sums
        self.parts: tuple[Slots | None, ...] = tuple(
            Slots(whole.region, whole.offset + i * H, H, whole.device)
            for whole, count, H in ((maxima, 3, maxima.length // 3), (sums, 2, sums.length // 2))
            for i in range(count)
        )


class AttentionProbe(HookingProbe):
    """Score statistics per head; see the module's docstring.

    Args:
        scores: glob over paths of modules whose output is a materialised score tensor.
    """

    name = "attention"

    def __init__(self, scores: str = "*.scores") -> None:
        super().__init__()
        self._scores = scores
        self._slots: dict[str, _HeadSlots] = {}
        self._sizes: dict[str, list[int]] = {}
        self._keys: dict[tuple[tuple[str, int], ...], tuple[Key, ...]] = {}
        self._mode: Calls | None = None
        self._running: Running | None = None
        self._depth = 0
        self._has_looked = False

    def _find(self) -> None:
        # A call is named after the module that makes it.
        self._path: dict[int, str] = {id(module): path for path, module in named_modules(self._context.model)}
        # Sites with a module of their own that shows their scores.
        self._told = {
            path.rpartition(".")[0] for path in self._path.values() if fnmatchcase(path, self._scores)
        }

    def _begin(self, measured: bool) -> None:
        if self._running is not None:
            self._running.begin(measured)

    def _fits(self) -> bool:
        # Hooks for an eager model do not fit a compiled one.
        return self._running is not None or not self._context.compiled

    def _hook(self) -> None:
        model = self._context.model
        for path, module in named_modules(model):
            if fnmatchcase(path, self._scores):
                watcher = self._guarded(self._watcher(path.rpartition(".")[0]))
                leave = shown(partial(observe, state=self._state(watcher)))
                self._after_forward(module, self._traceable(shown(watcher), leave))
        if self._context.compiled:
            self._follow(model)
            return
        # A loop may enter the model by a method other than forward: then passes begin at its blocks.
        for module in (model, *blocks(model).values()):
            self._before_forward(module, self._enter)
            self._after_forward(module, self._exit, always_call=True)

    def _follow(self, model: nn.Module) -> None:
        """Follow in compiled graphs which module calls: all modules but those without children."""
        self._running = Running(self._guarded(self._fused), self._guarded(self._softmax))
        for path, module in named_modules(model):
            if module is model or any(True for _ in module.children()):
                state = self._state(self._guarded(self._shown(path)))
                before, after = self._running.hooks(Shown(state, path not in self._told))
                self._before_forward(module, before, prepend=True)
                self._after_forward(module, after)

    def _shown(self, path: str) -> Callable[..., None]:
        scores = self._watcher(path)

        def watch(
            first: Tensor,
            query: Tensor | None = None,
            key: Tensor | None = None,
            mask: Tensor | None = None,
            causal: bool = False,
            scale: float | None = None,
        ) -> None:
            if query is None or key is None:
                scores(first)  # of a softmax
            elif self._armed and not in_backward() and query.numel() and key.numel():
                with torch.no_grad(), DisableTorchFunction():
                    self._record_fused(path, first, query, key, mask, causal, scale)

        return watch

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            self._context.traced = True
            return
        self._depth += 1
        if self._mode is None and counts(module):
            self._mode = Calls(self._guarded(self._fused), self._guarded(self._softmax))
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth -= 1
        if self._depth == 0:
            self._leave()

    def _leave(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None

    def _watcher(self, path: str) -> Callable[[Tensor], None]:
        def watch(scores: Tensor) -> None:
            if self._armed and not in_backward() and scores.dim() == 4 and measurable(scores):
                with torch.no_grad(), DisableTorchFunction():
                    self._record(path, materialised(scores))

        return watch

    def _fused(
        self,
        kernel: Kernel,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Take the ranges of one call; the arguments are those of scaled_dot_product_attention."""
        path, _ = self._caller()
        if path is None or query.dim() != 4 or not measurable(query) or not measurable(key):
            return
        if kernel.lse is not None and kernel.lse.numel():
            self._record_fused(path, kernel.lse, query, key, attn_mask, is_causal, scale)
        elif kernel.scores is not None:
            self._record(path, materialised(kernel.scores))

    def _softmax(self, scores: Tensor) -> None:
        """Take the range of a softmax's argument, where the softmax is attention's."""
        path, module = self._caller()
        if path is None or path in self._told or not measurable(scores):
            return
        heads = _heads(module) if scores.dim() == 3 else 0
        by_head_BHTS = by_head(scores, heads)
        if by_head_BHTS is not None:
            self._record(path, materialised(by_head_BHTS))

    def _caller(self) -> tuple[str | None, Any]:
        """Path of the innermost module whose method is running, and the module."""
        frame: FrameType | None = sys._getframe(3)
        while frame is not None:
            module = frame.f_locals.get("self")
            path = self._path.get(id(module))
            if path is not None and not isinstance(module, nn.Softmax):
                return path, module
            frame = frame.f_back
        return None, None

    def _record_fused(
        self,
        path: str,
        lse: Tensor,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> None:
        """Write the ranges that follow from a fused kernel's log-sum-exp, whatever its shape."""
        lse_BHT = lse.reshape(*query.shape[:2], -1)
        self._record(path, fused(lse_BHT, query, key, mask=mask, causal=causal, scale=scale))

    def _record(self, path: str, scores: ScoreRanges) -> None:
        """Write one call's ranges; calls of one module in one step combine."""
        if not self._context.wanted(path):
            return
        self._context.passed(f"attention/{path}")
        buffer, H, device = self._context.buffer, len(scores.largest), scores.largest.device
        known = self._sizes.setdefault(path, [])
        if H not in known:
            if len(known) == SIZES:
                return  # a dimension that changes with the data is no number of heads
            known.append(H)
        site = path if known[0] == H else f"{path}:{H}"
        slots = self._slots.get(site)
        if slots is None or slots.maxima.device != device:
            slots = self._slots[site] = _HeadSlots(
                buffer.reserve("maxima", 3 * H, device), buffer.reserve("head_sums", 2 * H, device)
            )
        buffer.put(slots.maxima, torch.cat([scores.largest, scores.sampled, -scores.smallest]).double())
        ones = torch.ones(H, dtype=torch.float64, device=device)
        buffer.put(slots.sums, torch.cat([scores.entropy.double(), ones]))

    def collect(self) -> Found | None:
        """Every attention module that the step's forward passes reached."""
        stamp = self._context.buffer.stamp
        seen = [(path, slots) for path, slots in self._slots.items() if slots.maxima.stamp == stamp]
        if self._context.order and not self._has_looked:
            self._has_looked = True
            if unseen := self._unseen():
                _log.warning(
                    "attention scores of %s are not seen: it calls no kernel of scaled_dot_product_attention that is known, and no "
                    "softmax (but flex_attention, say, or another package); a module named `scores` that returns them shows them",
                    ", ".join(unseen),
                )
        if not seen:
            return None
        return Found(sites=tuple(path for path, _ in seen), slots=[slots.parts for _, slots in seen])

    def _unseen(self) -> list[str]:
        """Classes called attention of which no module that ran showed scores, each with its first module."""
        first: dict[str, str] = {}
        shown: set[str] = set()
        for path, module in named_modules(self._context.model):
            name = type(module).__name__
            inside = f"{path}." if path else ""
            if not path or not _is_called_attention(module) or not self._context.wanted(path):
                continue
            if any(site.startswith(inside) for site in self._context.order):
                first.setdefault(name, path)
            if any(site == path or site.startswith(inside) for site in self._slots):
                shown.add(name)
        # An attention module inside another one (BERT's) is the same attention.
        seen_at = [path for name, path in first.items() if name in shown]
        return [
            f"{path} ({name})"
            for name, path in first.items()
            if name not in shown and not any(path.startswith(f"{one}.") for one in seen_at)
        ]

    def finish(self, gathered: Gathered) -> Readings:
        """The table's statistics."""
        values, heads = [], []
        for numbers in gathered.numbers:
            if any(x is None for x in numbers):
                # Ranks saw different numbers of heads, though not declared as sharded.
                values.append(np.full(len(STATISTICS), np.nan))
                heads.append(1)
                continue
            largest_H, sampled_H, negated_H, entropy_H, count_H = (x for x in numbers if x is not None)
            magnitude_H = np.maximum(np.abs(largest_H), np.abs(negated_H))
            values += [largest_H, sampled_H, -negated_H, entropy_H / count_H, headroom_bits(magnitude_H)]
            heads.append(len(largest_H))
        shape = tuple(zip(gathered.sites, heads, strict=True))
        if shape not in self._keys:
            keys = (
                Key("attention", path, statistic, head)
                for path, count in shape
                for statistic in STATISTICS
                for head in range(count)
            )
            self._keys = {shape: tuple(keys)}
        return Readings(self._keys[shape], np.concatenate(values))

    def companions(self, gathered: Gathered, numbers: Mapping[str, float]) -> dict[str, float]:
        """The largest score of all heads and layers, for the detector; NaN if any is."""
        largest = max(
            (float(numbers[0].max()) for numbers in gathered.numbers if numbers[0] is not None),
            key=lambda x: math.inf if math.isnan(x) else x,
            default=-math.inf,
        )
        return {} if largest == -math.inf else {"attention/-/score_max": largest}

    def detach(self) -> None:
        """Remove the hooks and leave the mode."""
        super().detach()
        self._leave()
        if self._running is not None:
            self._running.begin(False)
            self._running = None
        self._depth = 0


def _heads(module: nn.Module) -> int:
    """The number of heads that a module declares; without one, 1 if its class name has attention in it, else 0."""
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
    return next(
        (n for name in names if isinstance(n := getattr(module, name, None), int) and n > 0),
        int(_is_called_attention(module)),
    )


def _is_called_attention(module: Any) -> bool:
    return re.search("att(n|ention)", type(module).__name__, re.IGNORECASE) is not None


def shown(watcher: Callable[[Tensor], object]) -> Callable[..., None]:
    """A forward hook that shows the output to ``watcher``."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and (module.training or torch.is_grad_enabled()):
            watcher(output)

    return hook

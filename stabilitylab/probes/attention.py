"""Attention scores, per head, whether they are materialised or never leave a fused kernel.

*Materialised*: a module whose output is the score tensor [B, H, T, T] before the softmax (by default one
named ``scores``); masked entries are -inf or the format's minimum and do not count.

*Fused*: the kernel behind ``scaled_dot_product_attention`` returns the log-sum-exp of every row, since its
backward pass needs it, and

    row maximum <= log-sum-exp <= row maximum + log(keys in the row)

so the largest one bounds the largest score from above, with a slack of at most log n. It is read off the
kernel's own return value: the same kernel runs, and no second product Q K' is formed. Where PyTorch falls
back to its unfused path, the scores pass through a softmax there and are taken from it exactly.

Family ``attention``, site = the attention module's path, index = head:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| score_max | largest score; under a fused kernel the largest row log-sum-exp | score | see above |
| fp16_headroom_bits | log2(65504 / abs(score_max)) | bit | formats.py |
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitylab.probes.base import NOTHING, Context, Readings
from stabilitylab.probes.sites import blocks
from stabilitylab.statistics.buffer import Block
from stabilitylab.statistics.formats import headroom_bits
from stabilitylab.telemetry import Key

STATISTICS = ("score_max", "fp16_headroom_bits")

_SDPA = torch.nn.functional.scaled_dot_product_attention
_aten = torch.ops.aten
_FUSED = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
_SOFTMAX = {_aten._safe_softmax.default, _aten._softmax.default}


def unmasked_max(scores_BHTS: Tensor) -> Tensor:
    """Largest score of each head, [H]: masked entries, being the smallest numbers there are, cannot win."""
    return scores_BHTS.amax(dim=(0, 2, 3))


class _Kernel(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at what one call of scaled_dot_product_attention runs, and lets it run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.score_max_H: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FUSED:
            lse_BHT = result[1]
            if lse_BHT.dim() == 3 and lse_BHT.numel():
                heads = args[0].shape[1]
                self.score_max_H = lse_BHT[:, :heads, : args[0].shape[2]].amax(dim=(0, 2))
        elif func in _SOFTMAX and args[0].dim() == 4:
            self.score_max_H = unmasked_max(args[0])
        return result


class _Calls(TorchFunctionMode):
    """Sees every call of scaled_dot_product_attention while the model's forward pass runs."""

    def __init__(self, probe: AttentionProbe) -> None:
        super().__init__()
        self._probe = probe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _SDPA:
            return func(*args, **(kwargs or {}))
        with _Kernel() as kernel:
            result = func(*args, **(kwargs or {}))
        if kernel.score_max_H is not None and torch._C._current_graph_task_id() == -1:
            self._probe.record(self._probe.caller(), kernel.score_max_H)
        return result


class AttentionProbe:
    """Score statistics per head; see the module's docstring.

    Args:
        scores: the last part of the path of modules whose output is a materialised score tensor.
    """

    name = "attention"

    def __init__(self, scores: str = "scores") -> None:
        self._scores = scores
        self._handles: list[Any] = []
        self._blocks: dict[str, Block] = {}
        self._keys: dict[tuple[tuple[str, int], ...], tuple[Key, ...]] = {}
        self._mode: _Calls | None = None
        self._depth = 0

    def attach(self, context: Context) -> None:
        """Note the module paths: a call is named after the module it came from."""
        self._context = context
        self._path: dict[int, str] = {id(module): path for path, module in context.model.named_modules()}

    def arm(self, measured: bool) -> None:
        """Put the hooks in place, or take them away."""
        if measured == bool(self._handles):
            return
        if not measured:
            self.detach()
            return
        model = self._context.model
        for path, module in model.named_modules():
            if path.rpartition(".")[2] == self._scores and self._context.wanted(path):
                self._handles.append(
                    module.register_forward_hook(self._materialised(path.rpartition(".")[0]))
                )
        # The model's forward pass may be entered by another method than forward: then its blocks are
        # the way in.
        for module in (model, *blocks(model).values()):
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._exit, always_call=True))

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1
        if (
            self._depth == 1
            and torch._C._current_graph_task_id() == -1
            and (module.training or torch.is_grad_enabled())
        ):
            self._mode = _Calls(self)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._leave()

    def _leave(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None

    def _materialised(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1 or not (module.training or torch.is_grad_enabled()):
                return
            if isinstance(output, Tensor) and output.dim() == 4 and output.numel():
                self.record(path, unmasked_max(output.detach()))

        return hook

    def caller(self) -> str | None:
        """The path of the innermost module of the model whose method is running."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            path = self._path.get(id(frame.f_locals.get("self")))
            if path is not None:
                return path
            frame = frame.f_back
        return None

    def record(self, path: str | None, score_max_H: Tensor) -> None:
        """Write one call's maxima per head; calls of one module in one step merge."""
        if path is None or not self._context.wanted(path):
            return
        buffer = self._context.buffer
        block = self._blocks.get(path)
        if block is None or block.device != score_max_H.device or block.width != len(score_max_H):
            block = self._blocks[path] = buffer.reserve(len(score_max_H), 0, score_max_H.device)
        buffer.put(block, score_max_H.double())

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float
    ) -> None:
        """Not this probe's business."""

    def read(self) -> Readings:
        """The table's statistics of every attention module that the step's forward passes reached."""
        buffer = self._context.buffer
        seen = [(path, block) for path, block in self._blocks.items() if buffer.seen(block)]
        if not seen:
            return NOTHING
        values = []
        for _, block in seen:
            score_max_H = buffer.host(block)
            values += [score_max_H, headroom_bits(np.abs(score_max_H))]
        shape = tuple((path, block.width) for path, block in seen)
        keys = self._keys.get(shape)
        if keys is None:
            keys = tuple(
                Key("attention", path, statistic, head)
                for path, heads in shape
                for statistic in STATISTICS
                for head in range(heads)
            )
            self._keys = {shape: keys}
        return Readings(keys, np.concatenate(values))

    def detach(self) -> None:
        """Remove the hooks and leave every mode."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._leave()
        self._depth = 0

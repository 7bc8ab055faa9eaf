"""Sees the calls that make up attention as they happen: fused kernels with the log-sum-exp that they return, and softmaxes.

A mode on the stack of torch's function modes sees every call of ``scaled_dot_product_attention``, of
``multi_head_attention_forward`` (behind ``nn.MultiheadAttention``), and every softmax. What it then does depends on the mode of
execution:

*eager*: it makes a fused call under a dispatch mode that sees what the call runs: a fused kernel, whose second result is the
log-sum-exp, or, where PyTorch does not fuse, a softmax, whose argument is the scores. A softmax that the model calls itself shows
its argument.

*traced by torch.compile*: Dynamo traces the mode, the hooks that enter it and the list of running modules (all known when it
traces, so only the calling module's state remains in the graph). The mode replaces a fused call by the kernel that PyTorch would
choose, with an operator that shows its results (``compiled``), and puts an operator before a softmax. The graph does not break, and
the same kernels run. The mode chooses the kernel as PyTorch does (``sdp_utils_cpp.cpp``), for CPUs only; any other call it leaves
as it is and does not see.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stabilitylab.compat import TorchDispatchMode
from stabilitylab.probes.compiled import observe, observe_attention

_SDPA = torch.nn.functional.scaled_dot_product_attention
_MULTI_HEAD = torch.nn.functional.multi_head_attention_forward
_SOFTMAX = frozenset(
    {torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax, torch.special.softmax}
)
_aten = torch.ops.aten
# Fused kernels, with the places of the mask and "causal" among their arguments; query, key, value come first.
_FUSED = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: ("attn_mask", 4),
    _aten._scaled_dot_product_flash_attention.default: (None, 4),
    _aten._scaled_dot_product_efficient_attention.default: (3, 6),
    _aten._scaled_dot_product_cudnn_attention.default: (3, 6),
}
_ATEN_SOFTMAX = frozenset({_aten._safe_softmax.default, _aten._softmax.default})


class Kernel(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what one call of attention runs, and lets it run.

    Args:
        heads: reads scores of shape [B * heads, T, S] as [B, heads, T, S].

    Attributes:
        lse: a fused kernel's log-sum-exp.
        given: that kernel's arguments: query, key, mask, causal, scale.
        scores: [B, H, T, S], the argument of a softmax.
    """

    def __init__(self, heads: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lse: Tensor | None = None
        self.given: tuple[Tensor, Tensor, Tensor | None, bool, float | None] | None = None
        self.scores: Tensor | None = None
        self._heads = heads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _FUSED:
            mask, causal = _FUSED[func]
            self.lse = result[1]
            self.given = (
                args[0],
                args[1],
                kwargs.get(mask) if not isinstance(mask, int) else args[mask] if len(args) > mask else None,
                args[causal] if len(args) > causal else False,
                kwargs.get("scale"),
            )
        elif func in _ATEN_SOFTMAX:
            self.scores = by_head(args[0], self._heads)
        return result


def by_head(scores: Tensor, heads: int) -> Tensor | None:
    """Scores as [B, H, T, S]; None where ``heads`` (0: unknown) does not explain their shape."""
    if scores.dim() == 3 and heads and scores.shape[0] % heads == 0:
        return scores.view(-1, heads, *scores.shape[1:])
    return scores if scores.dim() == 4 else None


class Calls(TorchFunctionMode):
    """Sees every call of attention while it is on the stack.

    Args:
        saw: called at eager calls of fused attention with the kernel and the arguments of scaled_dot_product_attention.
        saw_scores: called at eager softmaxes over the last dimension with their argument.
        running: the state of the running modules, innermost last; see ``Running``.
    """

    def __init__(
        self,
        saw: Callable[..., None],
        saw_scores: Callable[..., None],
        running: list[Shown | None] | None = None,
    ) -> None:
        super().__init__()
        self._saw, self._saw_scores = saw, saw_scores
        self._running = running
        self.armed = True
        # Dynamo cannot trace this check: make it between the steps.
        self.flash: bool = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fused, softmax, multi_head = func is _SDPA, func in _SOFTMAX, func is _MULTI_HEAD
        if not (fused or softmax or multi_head):
            return func(*args, **kwargs)
        if torch.compiler.is_compiling():
            shown = self._running[-1] if self._running else None
            if shown is None:
                return func(*args, **kwargs)
            if fused and self.flash:
                return _traced(shown.state, *args, **kwargs)
            if softmax and shown.softmax:
                scores = _scores(args, kwargs)
                if scores is not None and scores.dim() == 4:
                    observe(scores, shown.state)
            return func(*args, **kwargs)
        if not self.armed:
            return func(*args, **kwargs)
        if softmax:
            scores = _scores(args, kwargs)
            if scores is not None:
                with torch.no_grad():
                    self._saw_scores(scores)
            return func(*args, **kwargs)
        with Kernel(heads=args[4] if multi_head and len(args) > 4 else 0) as kernel:
            result = func(*args, **kwargs)
        with torch.no_grad():
            if fused:
                self._saw(kernel, *args, **kwargs)
            elif kernel.given is not None:
                query, key, mask, causal, scale = kernel.given
                self._saw(kernel, query, key, key, mask, 0.0, causal, scale=scale)
            elif kernel.scores is not None:
                self._saw_scores(kernel.scores)
        return result


def _scores(args: Any, kwargs: Any) -> Tensor | None:
    """The argument of a softmax over the last dimension of a floating tensor."""
    scores = args[0] if args else kwargs.get("input")
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        return None
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return scores if dim is not None and dim in (-1, scores.dim() - 1) else None


def _traced(
    state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Make the call, with an operator that shows its kernel's results where that kernel is known."""
    if dropout_p == 0.0 and not enable_gqa and _flash_on_cpu(query, key, value, attn_mask):
        mask = attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), -math.inf)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        observe_attention(lse, query, key, attn_mask, is_causal, scale, state)
        result: Tensor = out
        return result
    return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _flash_on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether PyTorch takes the CPU's flash kernel for these arguments."""
    tensors = (query, key, value)
    return (
        all(x.device.type == "cpu" and x.dim() == 4 and x.stride(-1) == 1 for x in tensors)
        and query.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[3] == key.shape[3] == value.shape[3]
        and query.shape[2] > 0
        and key.shape[2] > 0
        and (mask is None or (mask.dim() in (2, 4) and not mask.requires_grad))
    )


class Shown(NamedTuple):
    """A running module: the state its calls are shown with, and whether its softmaxes are."""

    state: Tensor
    softmax: bool


class Running:
    """Keeps the list of running modules for a compiled model, and the mode, in hooks that Dynamo traces.

    Args:
        saw, saw_scores: called at calls outside compiled graphs, as by ``Calls``.
    """

    def __init__(self, saw: Callable[..., None], saw_scores: Callable[..., None]) -> None:
        self._stack: list[Shown | None] = []
        self.mode = Calls(saw, saw_scores, self._stack)

    def hooks(self, shown: Shown) -> tuple[Callable[..., None], Callable[..., None]]:
        """The hooks before and after a module's forward pass."""
        stack, mode = self._stack, self.mode

        def before(module: nn.Module, args: Any) -> None:
            if not stack:
                mode.__enter__()  # type: ignore[no-untyped-call]
            stack.append(shown if module.training or torch.is_grad_enabled() else None)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            stack.pop()
            if not stack:
                mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        return before, after

    def begin(self, armed: bool) -> None:
        """Begin a step, perhaps after a forward pass that raised."""
        self.mode.armed = armed
        self.mode.flash = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
        if self._stack:
            self._stack.clear()
            self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

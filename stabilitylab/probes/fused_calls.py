"""Calls of ``scaled_dot_product_attention``, seen as they happen, with the log-sum-exp that the kernel returns.

A mode on the stack of torch's function modes sees every call. What it does then depends on who runs:

*eager*: the call is made under a dispatch mode that looks at what it runs: a fused kernel, whose second result
is the log-sum-exp, or, where PyTorch does not fuse, a softmax, whose argument are the scores.

*traced by torch.compile*: Dynamo traces the mode, the hooks that enter it and the list of running modules (all
known when it traces, so that nothing of them is left in the graph but the state of the module that called). The
call is replaced by the very kernel that it would come to, with an operator that shows its results
(``compiled``). One graph, no break, the same kernel. Which kernel that is is decided here as PyTorch decides it
(``sdp_utils_cpp.cpp``), for CPUs alone; a call that would go another way is left as it is, unseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitylab.probes.compiled import observe_attention

_SDPA = torch.nn.functional.scaled_dot_product_attention
_aten = torch.ops.aten
_FUSED = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
_SOFTMAX = frozenset({_aten._safe_softmax.default, _aten._softmax.default})


class Kernel(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at what one call of scaled_dot_product_attention runs, and lets it run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lse: Tensor | None = None
        self.scores: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FUSED:
            self.lse = result[1]
        elif func in _SOFTMAX and args[0].dim() == 4:
            self.scores = args[0]
        return result


class Calls(TorchFunctionMode):
    """Sees every call of scaled_dot_product_attention while it is on the stack.

    Args:
        saw: told of eager calls: the kernel, and the call's arguments.
        running: states of the modules that are running, innermost last; None for one that is not watched.
    """

    def __init__(self, saw: Callable[..., None], running: list[Tensor | None] | None = None) -> None:
        super().__init__()
        self._saw = saw
        self._running = running
        self.armed = True
        # Dynamo does not trace the question: it is asked between the steps.
        self.flash: bool = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not _SDPA:
            return func(*args, **kwargs)
        if torch.compiler.is_compiling():
            state = self._running[-1] if self._running else None
            if state is None or not self.flash:
                return _SDPA(*args, **kwargs)
            return _traced(state, *args, **kwargs)
        if not self.armed:
            return func(*args, **kwargs)
        with Kernel() as kernel:
            result = func(*args, **kwargs)
        with torch.no_grad():
            self._saw(kernel, *args, **kwargs)
        return result


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
    """The call with an operator that shows what its kernel returned, where that kernel is known."""
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
    """Whether PyTorch takes the CPU's flash kernel for these."""
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


class Running:
    """Which modules are running, for a compiled model: hooks that Dynamo traces keep the list and the mode.

    Args:
        saw: told of calls outside of compiled graphs, as by ``Calls``.
    """

    def __init__(self, saw: Callable[..., None]) -> None:
        self._stack: list[Tensor | None] = []
        self.mode = Calls(saw, self._stack)

    def hooks(self, state: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
        """For before and after a module's forward pass."""
        stack, mode = self._stack, self.mode

        def before(module: nn.Module, args: Any) -> None:
            if not stack:
                mode.__enter__()  # type: ignore[no-untyped-call]
            stack.append(state if module.training or torch.is_grad_enabled() else None)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            stack.pop()
            if not stack:
                mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        return before, after

    def begin(self, armed: bool) -> None:
        """A step begins, perhaps after a forward pass that raised."""
        self.mode.armed = armed
        self.mode.flash = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
        if self._stack:
            self._stack.clear()
            self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

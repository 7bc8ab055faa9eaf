"""Watches inside ``torch.compile``, with hooks that Dynamo traces into the graph as operators, without breaking it.

Dynamo traces forward hooks. A hook that counted anything itself would break the graph; ours, when traced, leave an operator behind
that takes the tensor and a *state*: an integer tensor that holds a site's number. The operator claims to write the state, so that
the compiler neither removes nor reorders it. When the compiled graph runs, the operator asks the table of ``watchers`` who wants
the tensor, and does nothing if nobody does: in an unmeasured step, or once the monitor is closed. So the graph is compiled once and
stays one graph, whether a step is measured or not.

The number travels in a tensor and not as a constant because torch reuses a graph compiled for one block for all similar blocks: the
state is an input of the graph, and the hook of the running block supplies it.

Gradients go the same way: ``WatchGradient`` is an identity whose backward pass holds the operator. So do the arguments and results
of fused attention: ``observe_attention``.

A loop may compile the model under another name than the monitor's (``fast = torch.compile(model)``), or later. ``is_compiled``
searches all such wrappers in the process, whenever ``frames`` shows that something was compiled.

Limits. The operator keeps the compiler from fusing across it, and fused half-precision code rounds less often: a compiled watched
model may differ from a compiled unwatched one in the last bit (in float32 it does not). CUDA graphs replay kernels without running
Python, so the operators are marked as unsafe for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab import compat

Watcher = Callable[..., None]

# Site number -> who takes the tensor. An operator whose number is not here does nothing.
watchers: dict[int, Watcher] = {}
_numbers = itertools.count()

_library = torch.library.Library("stabilitylab", "DEF")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
for _signature in (
    "observe(Tensor x, Tensor(a!) state) -> ()",
    "observe_attention(Tensor lse, Tensor query, Tensor key, Tensor? mask, bool causal, float? scale,"
    " Tensor(a!) state) -> ()",
):
    _library.define(_signature, tags=_TAGS)  # type: ignore[no-untyped-call]


def _observe(x: Tensor, state: Tensor) -> None:
    watcher = watchers.get(int(state))
    if watcher is not None:
        watcher(x)


def _observe_attention(
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    state: Tensor,
) -> None:
    watcher = watchers.get(int(state))
    if watcher is not None:
        watcher(lse, query, key, mask, causal, scale)


for _name, _function in (("observe", _observe), ("observe_attention", _observe_attention)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"stabilitylab::{_name}", lambda *args: None, lib=_library)
observe = torch.ops.stabilitylab.observe
observe_attention = torch.ops.stabilitylab.observe_attention


class WatchGradient(torch.autograd.Function):
    """The identity; its backward pass shows the gradient to the watcher of ``state``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Tensor) -> Tensor:
        ctx.state = state
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        observe(gradient, ctx.state)
        return gradient, None


def register(watcher: Watcher) -> Tensor:
    """A state for the watcher, to pass to the operator. Give it back with ``unregister``."""
    number = next(_numbers)
    watchers[number] = watcher
    return torch.tensor(number)


def unregister(state: Tensor) -> None:
    """Stop showing tensors to the watcher of this state."""
    watchers.pop(int(state), None)


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` wraps the model or a part of it, in a wrapper that still exists."""
    wrapper = compat.optimized_module()
    if wrapper is None:
        return False
    modules = list(model.modules())
    if any(isinstance(m, wrapper) or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
        return True
    inside = {id(module) for module in modules}
    return any(id(x._modules.get("_orig_mod")) in inside for x in compat.optimized_modules())


def frames() -> int:
    """The number of frames compiled in this process."""
    return compat.compiled_frames()


def forget_graphs(model: nn.Module) -> None:
    """Have the model traced again, since graphs from before the hooks do not contain them."""
    compat.trace_again(getattr(type(module).forward, "__code__", None) for module in model.modules())

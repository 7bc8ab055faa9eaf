"""Watching inside ``torch.compile``: hooks that are traced into the graph as operators, without breaking it.

Dynamo traces forward hooks. A hook that counted anything itself would break the graph; ours, when traced, leave an operator behind
that takes the tensor and a *state*: an integer tensor that holds the number of a site, and that the operator claims to write, so
that nobody removes or reorders it. When the compiled graph runs, the operator asks the table of ``watchers`` who wants the tensor,
and does nothing if nobody does: after an unmeasured step, or once the monitor is closed. So the graph is compiled once and stays
one graph, whether a step is measured or not.

The number travels in a tensor and not as a constant because a graph compiled for one block is used again for all that are alike:
the state is an input of the graph and comes from the hook of the block at hand.

Gradients take the same way: ``WatchGradient`` is an identity whose backward pass holds the operator. So do calls of fused
attention, with what its kernel returned and was given: ``observe_attention``.

A model may be compiled under another name than the one that the monitor was given (``fast = torch.compile(model)``), or later.
``is_compiled`` looks among all such wrappers of the process, whenever ``frames`` says that something has been compiled.

Limits. The operator keeps the compiler from fusing across it, and with half precision what is fused is rounded less often: a
compiled watched model may differ from a compiled unwatched one in the last bit (in float32 it does not). CUDA graphs replay kernels
without asking anybody: the operators are marked as unsafe for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab import compat

Watcher = Callable[..., None]

# By site number: who takes the tensor. An operator whose number is not here does nothing.
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
    """The state for a watcher: pass it to the operator. Give it back with ``unregister``."""
    number = next(_numbers)
    watchers[number] = watcher
    return torch.tensor(number)


def unregister(state: Tensor) -> None:
    """The watcher of this state is shown nothing any more."""
    watchers.pop(int(state), None)


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it has been given to ``torch.compile``, and whatever came back is still there."""
    wrapper = compat.optimized_module()
    if wrapper is None:
        return False
    modules = list(model.modules())
    if any(isinstance(m, wrapper) or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
        return True
    inside = {id(module) for module in modules}
    return any(id(x._modules.get("_orig_mod")) in inside for x in compat.optimized_modules())


def frames() -> int:
    """How many frames have been compiled in this process."""
    return compat.compiled_frames()


def forget_graphs(model: nn.Module) -> None:
    """Have the model traced again: graphs made before the hooks were in place do not have them in."""
    compat.trace_again(getattr(type(module).forward, "__code__", None) for module in model.modules())

"""Presents the optimizers of a run as one, for reading and hooking, never for stepping.

Some runs have one optimizer, some have one for the matrices and another for the rest (Muon and AdamW), some one inside a wrapper
that forwards to it (accelerate's). The monitor reads ``param_groups`` and ``state`` and hooks the steps; ``Optimizers`` offers
these four over all of them.

Parameters may join later (``add_param_group``: adapters, layers thawed one after the other). ``joined`` names them, so that a norm
over "all parameters" stays one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.errors import InputError
from stabilitylab.model_structure import named_parameters

_READ = ("param_groups", "state", "register_step_pre_hook", "register_step_post_hook")


class Optimizers:
    """One or several optimizers.

    Args:
        given: an optimizer, a sequence of them, or None.

    Attributes:
        each: those whose steps are hooked.
        known: the ids of their parameters.

    Raises:
        InputError: an element is not an optimizer with torch's interface.
    """

    def __init__(self, given: Any) -> None:
        several = given if isinstance(given, Sequence) else () if given is None else (given,)
        self.each: tuple[Any, ...] = tuple(_inner(optimizer) for optimizer in several)
        # Optimizers may hold tensors outside the model (another model's, flat masters): those stay out.
        self.known = {id(p) for p in self._parameters()}

    def __bool__(self) -> bool:
        return bool(self.each)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all."""
        return [group for optimizer in self.each for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        """The state of all."""
        return {p: state for optimizer in self.each for p, state in optimizer.state.items()}

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Handles:
        """Call the hook before each step of any, with the optimizer that steps."""
        return Handles([optimizer.register_step_pre_hook(hook) for optimizer in self.each])

    def register_step_post_hook(self, hook: Callable[..., Any]) -> Handles:
        """Call the hook after each step of any, with the optimizer that steps."""
        return Handles([optimizer.register_step_post_hook(hook) for optimizer in self.each])

    def joined(self, model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters that joined an optimizer since the last call and are not among the ``named`` ones: by the model's name, or
        where the model does not know them, by their place in the optimizer."""
        if all(id(p) in self.known for p in self._parameters()):
            return {}
        seen = {id(p) for p in named.values()}
        names = {id(p): name for name, p in named_parameters(model).items()}
        found: dict[str, Tensor] = {}
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if id(p) not in self.known and id(p) not in seen:
                    name = names.get(id(p), "")
                    found[name if name and name not in named else f"optimizer.{g}.{i}"] = p
        self.known |= {id(p) for p in self._parameters()}
        return found

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


class Handles:
    """Several handles, removed as one."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove all."""
        for handle in self._handles:
            handle.remove()


def _inner(given: Any) -> Any:
    """The optimizer inside wrappers that only forward to it, and have no hooks of their own."""
    optimizer = given
    for _ in range(8):
        if _hookable(optimizer):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    raise InputError(
        f"optimizer is a {type(given).__name__}: the monitor reads torch.optim.Optimizer, one or a list of them; "
        "with another, give none and call monitor.gradients_ready() before its step"
    )


def _hookable(optimizer: Any) -> bool:
    # A wrapper may inherit from torch's class and never initialise it: then it has the methods but no hooks.
    if isinstance(optimizer, torch.optim.Optimizer) and not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return False
    return all(hasattr(optimizer, name) for name in _READ)

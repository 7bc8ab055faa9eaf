"""Presents the optimizers of a run as one, for reading and hooking, never for stepping.

Some runs have one optimizer, some have one for the matrices and another for the rest (Muon and AdamW), some one inside a wrapper
that forwards to it (accelerate's). The monitor reads ``param_groups`` and ``state`` and hooks the steps; ``Optimizers`` offers
these four over all of them.

Parameters may join later (``add_param_group``: adapters, layers thawed one after the other). ``joined`` names them, so that a norm
over "all parameters" stays one.

A compiled step (``torch.compile(optimizer.step)``) would trace the hooks, which read and write what no graph may. So the compiler
is kept out of them: ``torch.compiler.disable`` makes it break the graph there. That call imports the compiler, which takes longer
than a small model's first steps, so ``follow_compiler`` makes it once something else has imported the compiler; a step traced
before that goes unseen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        self.known = {id(p) for p in parameters_of(self)}
        self._hooks: list[StepHook] = []
        self._is_compiler_here = False
        self.follow_compiler()

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

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> StepHook:
        """Call the hook before each step of any, with the optimizer that steps."""
        return self._placed(hook, "register_step_pre_hook")

    def register_step_post_hook(self, hook: Callable[..., Any]) -> StepHook:
        """Call the hook after each step of any, with the optimizer that steps."""
        return self._placed(hook, "register_step_post_hook")

    def _placed(self, hook: Callable[..., Any], register: str) -> StepHook:
        placed = StepHook([getattr(optimizer, register) for optimizer in self.each], hook)
        placed.place(is_compiler_here=self._is_compiler_here)
        self._hooks = [one for one in self._hooks if one.is_in_place] + [placed]
        return placed

    def follow_compiler(self) -> bool:
        """Keep the compiler out of the hooks if it has been imported since the last call; whether it has."""
        if self._is_compiler_here or not compiler_is_imported():
            return False
        self._is_compiler_here = True
        for hook in self._hooks:
            if hook.is_in_place:
                hook.remove()
                hook.place(is_compiler_here=True)
        return True

    def joined(self, model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters that joined an optimizer since the last call and are not among the ``named`` ones: by the model's name, or
        where the model does not know them, by their place in the optimizer."""
        if all(id(p) in self.known for p in parameters_of(self)):
            return {}
        seen = {id(p) for p in named.values()}
        names = {id(p): name for name, p in named_parameters(model).items()}
        found: dict[str, Tensor] = {}
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if id(p) not in self.known and id(p) not in seen:
                    name = names.get(id(p), "")
                    found[name if name and name not in named else f"optimizer.{g}.{i}"] = p
        self.known |= {id(p) for p in parameters_of(self)}
        return found


class StepHook:
    """A hook on the steps of several optimizers, removed as one.

    Args:
        register: the optimizers' methods that take the hook.
        hook: called with the optimizer, and the arguments of its step.
    """

    def __init__(self, register: Sequence[Callable[..., Any]], hook: Callable[..., Any]) -> None:
        self._register, self._hook = register, hook
        self._handles: list[Any] = []

    @property
    def is_in_place(self) -> bool:
        """Whether steps call the hook."""
        return bool(self._handles)

    def place(self, *, is_compiler_here: bool) -> None:
        """Hook the steps, such that the compiler does not trace into the hook."""
        disable: Any = torch.compiler.disable
        hook = disable(self._hook) if is_compiler_here else _unless_traced(self._hook)
        self._handles = [register(hook) for register in self._register]

    def remove(self) -> None:
        """Take the hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def parameters_of(optimizer: Any) -> Iterator[Tensor]:
    """The parameters of all groups, in their order."""
    return (p for group in optimizer.param_groups for p in group["params"])


def compiler_is_imported() -> bool:
    """Whether anything has imported the compiler, without which nothing is compiled."""
    return "torch._dynamo" in sys.modules


def _unless_traced(hook: Callable[..., Any]) -> Callable[..., None]:
    def outside(*arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            hook(*arguments)

    return outside


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

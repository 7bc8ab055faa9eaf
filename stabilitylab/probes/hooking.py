"""The base of probes that hook: attaching, arming, detaching, errors and compiled models.

Hooks exist only while a step is measured, and cost nothing otherwise. Dynamo traces those on modules of a compiled model into its
graphs once, so they must stay: there ``_armed`` says whether they look. ``Context.guarded`` reports an error in a hook instead of
raising it, and makes hooks ignore passes outside training; a copy of the model is not watched (``Hook``).

A probe of your own finds its sites in ``_find`` and places its hooks in ``_hook``:

    class LoudestProbe(HookingProbe):
        name = "loudest"

        def _hook(self) -> None:
            for path, module in self._context.model.named_modules():
                self._after_forward(module, self._guarded(partial(self._look, path)))

and has ``collect`` and ``finish`` like every probe (``stabilitylab.probes.base``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.probes.base import Context
from stabilitylab.probes.compiled import register, unregister
from stabilitylab.probes.hooks import Hook
from stabilitylab.statistics.buffer import Slots

Function = Callable[..., Any]


def takes_hooks(module: nn.Module) -> bool:
    """Whether hooks can be put on the module; TorchScript's, which run outside Python, raise where one tries."""
    return not isinstance(module, torch.jit.ScriptModule)


class HookingProbe:
    """The base class of probes with hooks; see the module's docstring."""

    name: str
    # Whether hooks are on modules, and so stay for good where the model is compiled.
    stays_in_graphs = True

    def __init__(self) -> None:
        self._handles: list[Any] = []
        # The states of our operators in compiled graphs.
        self._states: list[Tensor] = []
        self._armed = False

    def attach(self, context: Context) -> None:
        """Find the sites; hook nothing before a measured step."""
        self._context = context
        self._find()

    def arm(self, measured: bool) -> None:
        """Begin a step: put the hooks in place, or take them away."""
        self._begin(measured)
        wanted = measured
        if self.stays_in_graphs:
            self._context.follow_compiler()
            wanted = measured or self._context.compiled
        if self._handles and not (wanted and self._fits()):
            self.detach()
        self._armed = measured
        if wanted and not self._handles:
            self._hook()

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float | Slots
    ) -> None:
        """Nothing to do for a probe that hooks."""

    def detach(self) -> None:
        """Remove the hooks; those in graphs still alive see nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for state in self._states:
            unregister(state)
        self._states.clear()
        self._armed = False

    # For a probe to override.

    def _find(self) -> None:
        """Choose the sites, once."""

    def _begin(self, measured: bool) -> None:
        """Forget the last step."""

    def _fits(self) -> bool:
        """Whether the hooks in place are those that the model needs, compiled or not."""
        return True

    def _hook(self) -> None:
        """Put the hooks in place."""
        raise NotImplementedError

    # For a probe to use.

    def _guarded(self, function: Function) -> Function:
        return self._context.guarded(self.name, function)

    def _state(self, watcher: Function) -> Tensor:
        """The state by which operators in compiled graphs know the (guarded) watcher."""
        self._states.append(register(watcher))
        return self._states[-1]

    def _before_forward(self, module: nn.Module, hook: Function, **how: bool) -> None:
        if takes_hooks(module):
            self._handles.append(module.register_forward_pre_hook(Hook(hook), **how))

    def _after_forward(self, module: nn.Module, hook: Function, **how: bool) -> None:
        if takes_hooks(module):
            self._handles.append(module.register_forward_hook(Hook(hook), **how))

    def _around_step(self, before: Function, after: Function) -> None:
        """Hook the optimizer, if there is one."""
        optimizer = self._context.optimizer
        if optimizer is not None:
            self._handles.append(optimizer.register_step_pre_hook(self._guarded(before)))
            self._handles.append(optimizer.register_step_post_hook(self._guarded(after)))

    def _traceable(self, eager: Function, leave: Function) -> Function:
        """A hook that runs ``eager``, or, where the compiler traces it, ``leave``, which leaves operators behind."""
        context = self._context

        def hook(*args: Any) -> Any:
            if not torch.compiler.is_compiling():
                return eager(*args)
            if context.compiled:
                return leave(*args)
            context.traced = True
            return None

        return hook

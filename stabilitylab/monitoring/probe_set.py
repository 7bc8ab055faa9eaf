"""The probes on a model: attaches them, arms them for a step, gives them its gradients, collects their numbers, detaches them.

It reads each parameter's gradient once per step, at the first of these moments:

    gradients_ready            the loop says so, of all: reduced and unscaled, not yet clipped
    before torch clips them    of those that are clipped (clipping.py)
    before an optimizer steps  its hook, of its own: another optimizer's may be the last step's still (a GAN's). After the
                               step where that runs the backward pass itself (a closure)
    the scaler has decided     it found them non-finite and left the optimizer's step, and so the hook, out
    the end of the step        there is no optimizer

Where a loop clips with its own code, the probes see only the gradients that the optimizer gets, and an event ``gradients-changed``
says so.

A probe that raises is dropped from the next step on, and training continues.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.model_structure import clean, named_parameters
from stabilitylab.monitoring.clipping import ClipWatch, Untouched
from stabilitylab.monitoring.empty_steps import EmptySteps
from stabilitylab.monitoring.grad_scaler import ScalerState
from stabilitylab.monitoring.loop_values import LoopValues
from stabilitylab.monitoring.optimizers import Optimizers, StepHook, parameters_of
from stabilitylab.monitoring.rank_gather import Manifest
from stabilitylab.probes.base import Context, Placing, Probe
from stabilitylab.probes.compiled import forget_graphs
from stabilitylab.probes.hooking import takes_hooks
from stabilitylab.statistics.buffer import Slots

_log = logging.getLogger("stabilitylab")


class ProbeSet:
    """All probes of a monitor.

    Args:
        context: lent to the probes.
        probes: in the order of their work.
        optimizers: have their steps hooked.
        scaler: torch's loss scaler, or None.
        shard: the part of sharded tensors that this process holds.
        tell: called with the step, kind and data of each event to record.
        alone: whether this process has the whole gradient as soon as its backward pass is over.
    """

    def __init__(
        self,
        context: Context,
        probes: Sequence[Probe],
        optimizers: Optimizers,
        *,
        scaler: torch.amp.GradScaler | None,
        shard: int,
        tell: Callable[[int, str, Mapping[str, Any]], None],
        alone: bool,
    ) -> None:
        self._context, self._optimizers, self._tell = context, optimizers, tell
        context.failed = self._probe_failed
        self.probes = tuple(probes)
        self.costly = {probe.name for probe in self.probes if getattr(probe, "is_costly", False)}
        self._placing = {probe.name: Placing(context.is_sharded, shard) for probe in self.probes}
        self._scale = ScalerState(scaler, optimizers.each, context.buffer)
        self.loop_values = LoopValues(context, optimizers, self._scale)
        self._empty_steps = EmptySteps(context.parameters, lambda kind, data: tell(self._step, kind, data))
        self._failed: set[str] = set()
        self._handles: list[StepHook | ClipWatch | Untouched] = []
        self._alone = alone
        self._untouched: Untouched | None = None
        self._armed: list[Probe] = []
        # Names of the parameters already read in this step; all once the loop has announced its gradients.
        self._read_already: set[str] = set()
        self._taken = self._warned = self._changed = self._stepped = False
        named = named_parameters(context.model)
        # Not those given instead of the model's, like fp32 masters.
        self._models_own = {name for name, p in context.parameters.items() if named.get(name) is p}
        self._step = 0

    def attach(self) -> None:
        """Find the sites, hook the optimizers. If that fails, nothing stays hooked."""
        try:
            if self._context.compiled:
                forget_graphs(self._context.model)
            _warn_of_scripted(self._context.model)
            for probe in self.probes:
                probe.attach(self._context)
            self._handles.append(self._optimizers.register_step_pre_hook(self._optimizer_begins))
            self._handles.append(self._optimizers.register_step_post_hook(self._optimizer_stepped))
            self._scale.watch(decided=self._scaler_decided, unscaled=self._unscaled)
            self._handles.append(ClipWatch(self._clipping))
            if self._alone and self._optimizers:
                self._untouched = Untouched(self._context.parameters.values())
                self._handles.append(self._untouched)
        except BaseException:
            self.detach()
            raise

    def arm(self, step: int, due: Sequence[Probe]) -> None:
        """Begin a step that these probes measure."""
        self._armed = [probe for probe in due if probe.name not in self._failed]
        for probe in self.probes:
            probe.arm(probe in self._armed)
        self._context.buffer.advance()
        self._taken = self._stepped = False
        self._read_already.clear()
        self.loop_values.begin()
        self._step = step
        self._context.loss_scale = self._scale.coming() if self._armed else 1.0

    def gradients_ready(
        self,
        gradients: Mapping[str, Tensor] | None = None,
        norms: Mapping[str, Tensor | float] | None = None,
        scale: float = 1.0,
        loss_scale: float | None = None,
    ) -> None:
        """See ``Monitor.gradients_ready``."""
        self._taken = True
        if not self._armed:
            return
        if scale != 1.0 or loss_scale is not None:
            self._context.loss_scale = scale if loss_scale is None else loss_scale
        found = self._gradients() if gradients is None else gradients
        found, scaled = self._scale.evened(found, self._context.parameters)
        self._read(found, norms or {}, scale if scale != 1.0 else self._context.loss_scale if scaled else 1.0)

    def end(self) -> None:
        """End the step: read gradients that nobody announced."""
        is_unseen = self._optimizers.follow_compiler() and not self._stepped
        if not self._armed or is_unseen:
            return
        if not (self._taken or self._read_already or self._optimizers):
            self._read(self._gradients(), {}, 1.0)
        if not self._warned and len(self._read_already) < len(self._context.parameters):
            self._warn_of_missing_gradients()

    def _warn_of_missing_gradients(self) -> None:
        if replaced := self._replaced():
            self._warned = True
            _log.warning(
                "the model no longer has %d of the parameters that the monitor watches (%s): after replacing parameters, close it "
                "and make a new one, with the optimizer of the new ones",
                len(replaced),
                ", ".join([*replaced[:3], *(["..."] if len(replaced) > 3 else [])]),
            )
        elif not self._read_already:
            self._warned = True
            _log.warning("no parameter had a gradient at step %d: %s", self._step, self._why_no_gradient())

    def _replaced(self) -> list[str]:
        """The parameters without a gradient that were the model's when the monitor was made, and are so no more."""
        named = self._context.parameters
        missing = [n for n in self._models_own - self._read_already if named[n].requires_grad]
        now = {id(p) for p in named_parameters(self._context.model).values()} if missing else set()
        return sorted(name for name in missing if id(named[name]) not in now)

    def _why_no_gradient(self) -> str:
        if not any(p.requires_grad for p in self._context.parameters.values()):
            return "all are frozen (requires_grad is False), so there are no gradients and updates to record"
        if not self._optimizers:
            return "call monitor.step or monitor.gradients_ready before zero_grad"
        if not self._stepped:
            return (
                "the monitor's optimizer did not step; if another one steps now, make a new monitor with it, and if a GradScaler "
                "leaves steps out, give it to the monitor as scaler="
            )
        return (
            "the optimizer stepped without any: call zero_grad() after its step, not before (those that are used up within the "
            "backward pass are not seen)"
        )

    def manifest(self) -> Manifest:
        """What the probes found in the step, and its places in the buffer."""
        found = [(p, self._context.guarded(p.name, p.collect)()) for p in self._armed]
        buffer = self._context.buffer
        buffer.compact()
        return tuple((p.name, self._placing[p.name].seen(f, buffer)) for p, f in found if f is not None)

    def detach(self) -> None:
        """Take every hook away."""
        for probe in self.probes:
            probe.detach()
        for handle in self._handles:
            handle.remove()
        self._scale.release()

    @property
    def nbytes(self) -> int:
        """Memory held on the model's devices."""
        return self._context.buffer.nbytes + sum(getattr(probe, "nbytes", 0) for probe in self.probes)

    def _gradients(self) -> dict[str, Tensor]:
        """Every parameter's gradient, also of those that joined an optimizer since the last measured step."""
        parameters = self._context.parameters
        if joined := self._optimizers.joined(self._context.model, parameters):
            self._context.parameters = parameters = {**parameters, **joined}
            for probe in self.probes:
                if (name_parameters := getattr(probe, "name_parameters", None)) is not None:
                    name_parameters()
            self._tell(self._step, "parameters-joined", {"parameters": list(joined)})
        return {name: g for name, p in parameters.items() if (g := p.grad) is not None}

    def _read(
        self,
        gradients: Mapping[str, Tensor],
        norms: Mapping[str, Tensor | float],
        scale: float | Slots,
    ) -> None:
        self._read_already |= gradients.keys() | norms.keys()
        for probe in self._armed:
            self._context.guarded(probe.name, probe.gradients)(gradients, norms, scale)

    def _optimizer_begins(self, optimizer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._stepped = True
        self.loop_values.stepping(optimizer)
        # With a closure the backward pass is still to come, inside the step.
        if not any(callable(argument) for argument in (*args, *kwargs.values())):
            self._empty_steps.begins(optimizer)
            self._take_at_step(optimizer)

    def _optimizer_stepped(self, optimizer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._empty_steps.ends(optimizer)
        self._take_at_step(optimizer)

    def _take_at_step(self, optimizer: Any) -> None:
        if self._armed and not self._taken:
            self._take(list(parameters_of(optimizer)), at_the_step=True)

    def _scaler_decided(self) -> None:
        self.loop_values.decided()
        if self._armed and not self._taken:
            for optimizer in self._scale.decided():
                self._take_at_step(optimizer)

    def _unscaled(self) -> None:
        if self._untouched is not None:
            self._untouched.note()

    def _clipping(self, parameters: Sequence[Tensor], norm: Tensor | None) -> None:
        self.loop_values.clipping(parameters, norm)
        if self._armed and not self._taken:
            self._take(parameters)

    def _take(self, parameters: Sequence[Tensor], *, at_the_step: bool = False) -> None:
        """Read these parameters' gradients, and at an optimizer's step those that no optimizer has, unless already read."""
        found, named = self._gradients(), self._context.parameters
        mine = {id(p) for p in parameters}
        if at_the_step:
            mine |= {id(p) for p in named.values()} - self._optimizers.known
        new = {n: g for n, g in found.items() if n not in self._read_already and id(named[n]) in mine}
        if not new:
            return
        # A scaler looks for infinities by an operation in place that multiplies by one.
        if (
            at_the_step
            and self._untouched is not None
            and not (self._changed or self._scale.is_in_gradients())
        ):
            self._changed = self._untouched.changed([named[name] for name in new])
            if self._changed:
                self._say_changed()
        new, scaled = self._scale.evened(new, named)  # type: ignore[assignment]
        self._read(new, {}, self._context.loss_scale if scaled else 1.0)

    def _say_changed(self) -> None:
        reason = "gradients were changed in place between the backward pass and the optimizer's step"
        self._tell(self._step, "gradients-changed", {"reason": reason})
        _log.warning(
            "%s (step %d), as by your own clipping: what is recorded of them is after it; for before it, call "
            "monitor.gradients_ready() there",
            reason,
            self._step,
        )

    def _probe_failed(self, name: str, error: Exception) -> None:
        if os.environ.get("STABILITYLAB_STRICT") == "1":
            raise error
        if name not in self._failed:
            self._failed.add(name)
            reason = f"{type(error).__name__}: {error}"
            _log.warning(
                "telemetry lost: the probe %s failed (%s); training continues without it", name, reason
            )
            self._tell(self._step, "telemetry-lost", {"probe": name, "reason": reason})


def _warn_of_scripted(model: nn.Module) -> None:
    scripted = [
        clean(path) or "the model" for path, module in model.named_modules() if not takes_hooks(module)
    ]
    outermost = [path for path in scripted if not any(path.startswith(f"{above}.") for above in scripted)]
    if scripted:
        _log.warning(
            "TorchScript takes no hooks, so the activations of %s are not seen; gradients and updates are",
            "the model" if scripted[0] == "the model" else ", ".join(outermost),
        )

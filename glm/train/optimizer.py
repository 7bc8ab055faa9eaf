"""Updates fp32 masters by a rule, AdamW by default, with clipping whose norms are telemetry.

For gradient g (unscaled, clipped by min(1, clip / |g|) over all parameters together), step t from 1, betas b1, b2:

    m = b1 m + (1 - b1) g                v = b2 v + (1 - b2) g^2
    w = w - rate wd w - rate / c  m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

(Loshchilov and Hutter, 1711.05101.) w are fp32 masters; a half-precision model's weights are those, rounded, after every update. c
is 1, or with ``update_clipping`` max(1, RMS_t), RMS_t = sqrt(mean(g^2 / max(v, eps^2))) per tensor: StableAdamW (2304.13013,
section 3.4). ``glm.train.update_rules`` has the other rules, guards and kinds of decay, functions that know nothing of masters,
groups, ranks and checkpoints.

Parameters that are ``withheld`` keep master, weight and all moments to the last bit; the others get the update that they would have
had, with the same clipping factor. Renewed second moments forget their past: the optimizer sets v so that this update's v / (1 -
b2^t) is g^2.

The optimizer computes norms once per step and tensor; the global one follows from them, and telemetry gets them for nothing. It
does not apply a gradient that is not finite. torch's fused kernel makes AdamW's update: one pass over weight, gradient and moments,
with clipping. Groups carry ``betas``, ``eps`` and ``step`` as torch's own optimizers do, so that instruments can correct the
moments' bias.

Limits: one device; decay applies to matrices, not to biases, norms and other vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from glm.errors import InputError
from glm.precision import PrecisionPolicy
from glm.train.gradient_summary import GradientSummary
from glm.train.update_rules import RULES, OptimizerConfig
from glm.train.update_rules.adam import MOMENTS
from glm.train.update_rules.application import (
    PastValues,
    bound_update,
    decay_share,
    directions_of,
    make_cautious,
    take_off,
)
from glm.train.update_rules.fused import apply_adamw, renewed, stable_rates
from glm.train.update_rules.guards import Guards
from glm.train.update_rules.muon import matrix_rows
from glm.train.update_rules.parameter_groups import grouped
from glm.train.update_rules.zclip import ZClip
from glm.train.weight_rounding import MasterRounding, round_weights
from stabilitylab.compat import plain

COMPENSATION = "compensation"


class MixedPrecisionAdamW(torch.optim.Optimizer):
    """AdamW, or another rule, over a model's parameters.

    The model must come in fp32; under a half-precision policy the optimizer casts it, and its fp32 weights become the masters.

    Args:
        model: its parameters, by name.
        config: constants.
        policy: number formats.
        peak: highest learning rate of the schedule, for kinds of decay that depend on it.
        factors: on the rates of single parameters, by name; they divide those parameters' decay (``glm.model.scaling``).
        kept: of a weight (``glm.train.weight_rounding``).
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        policy: PrecisionPolicy,
        *,
        peak: float = 1.0,
        factors: Mapping[str, float] | None = None,
        kept: MasterRounding = "masters",
        seed: int = 0,
    ) -> None:
        self.config, self.policy = config, policy
        named = dict(model.named_parameters())
        initial = (
            {name: parameter.detach().clone() for name, parameter in named.items()}
            if policy.has_masters
            else {}
        )
        policy.cast(model)
        self._live = dict(model.named_parameters())
        self._masters = self._make_masters(initial)
        constants = {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": config.epsilon, "step": 0}
        groups = [
            {"params": [self._masters[name] for name in names], **settings}
            for settings, names in grouped(
                config, {name: live.dim() for name, live in self._live.items()}, factors or {}
            )
        ]
        super().__init__(groups, constants)
        for group in groups:
            for master in group["params"]:
                self.state[master] = RULES[group["rule"]].state(master)
        self._names = {master: name for name, master in self._masters.items()}
        self._kept, self._seed = kept, seed
        if kept != "masters":
            for master in self._names:
                master.data.copy_(master.bfloat16())
                if kept == "kahan":
                    self.state[master][COMPENSATION] = torch.zeros_like(master)
        self._rows = matrix_rows(model, per_head=config.muon.per_head) if config.kind == "muon" else {}
        self._peak = peak
        self.guards = Guards(config.guard)
        self._update_norms = PastValues()
        # The loss, for skip-step; whether the last gradient was not finite.
        self.loss = 0.0
        self.overflowed = False
        self._accumulated: dict[str, Tensor] = {}
        self._summary: GradientSummary | None = None
        self._clip, self._rate = config.clip, 0.0
        # Names of the parameters that updates leave alone, and of those whose second moments the next update begins anew.
        self.withheld: frozenset[str] = frozenset()
        self.renewed: frozenset[str] = frozenset()
        # Called at the end of an update to move the masters further; returns telemetry.
        self.after_update: Callable[[], Mapping[str, Tensor]] | None = None
        self.updates = 0
        self._zclip = ZClip()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Like torch's own, without loading torch's compiler, which takes a fifth of a short run's time."""
        plain(torch.optim.Optimizer.add_param_group)(self, param_group)

    def _make_masters(self, initial: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """The tensors to update, by parameter name: copies of ``initial`` in fp32, or the weights themselves if that is empty."""
        return {
            name: nn.Parameter(initial[name], requires_grad=live.requires_grad) if initial else live
            for name, live in self._live.items()
        }

    # ------------------------------------------------------------------------------------------------ gradients

    def accumulate(self) -> None:
        """Call after a micro-batch's backward pass. Moves half gradients into fp32 where the policy accumulates there."""
        if not self.policy.accumulates_in_fp32:
            return
        for name, live in self._live.items():
            if live.grad is not None:
                if name in self._accumulated:
                    self._accumulated[name] += live.grad
                else:
                    self._accumulated[name] = live.grad.float()
                live.grad = None

    @torch.no_grad()
    def gradients(self, scale: float) -> GradientSummary:
        """The accumulated gradient in fp32, divided by the loss scale, and its norms."""
        found = self._found()
        if scale != 1.0 and found:
            if not self.policy.has_masters:
                raise InputError("a loss scale needs a half-precision policy")
            torch._foreach_mul_(list(found.values()), 1.0 / scale)
        norms, total = self._norms(found)
        for name, gradient in found.items():
            self._masters[name].grad = gradient
        self._summary = GradientSummary(
            global_norm=total, norms=norms, gradients=found, accumulated=self.accumulated()
        )
        return self._summary

    @torch.no_grad()
    def measure_again(self) -> None:
        """Compute the norms again, where something changed the gradients after ``gradients``."""
        if self._summary is not None:
            found = {name: master.grad for name, master in self._masters.items() if master.grad is not None}
            norms, total = self._norms(found)
            self._summary = replace(self._summary, global_norm=total, norms=norms, gradients=found)

    def _found(self) -> dict[str, Tensor]:
        """The accumulated gradient of each master, in fp32."""
        return {name: gradient.float() for name, gradient in self.accumulated().items()}

    def accumulated(self) -> dict[str, Tensor]:
        """The gradients of the micro-batches so far, in the accumulation format, with the loss scale."""
        if self.policy.accumulates_in_fp32:
            return self._accumulated
        return {name: live.grad for name, live in self._live.items() if live.grad is not None}

    def _norms(self, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """Norms by parameter, and over all."""
        norms = dict(zip(found, torch._foreach_norm(list(found.values())), strict=True)) if found else {}
        return norms, float(torch.linalg.vector_norm(torch.stack(list(norms.values())))) if norms else 0.0

    # --------------------------------------------------------------------------------------------------- update

    def step_with(self, rate: float, *, clip: float) -> bool:
        """Clip and apply the gradient that ``gradients`` summed up. False: it was not finite, or a guard rejected it, and nothing
        changed.

        Args:
            rate: learning rate of this update.
            clip: bound of the global norm; 0 is off.
        """
        if self._summary is None:
            raise RuntimeError("call gradients() before step_with()")
        self.overflowed = not self._summary.is_finite
        if self.overflowed or self.guards.leaves_out(self.loss, self._summary.global_norm):
            return False
        rate *= self.guards.rate_factor(self.updates + 1)
        for group in self.param_groups:
            group["lr"] = rate * group["rate_factor"]
        self._rate, self._clip = rate, clip
        self.step()
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the gradient. The optimizer's hooks run around it."""
        assert closure is None
        assert self._summary is not None
        factor = self._clip_factor(self._summary.global_norm)
        self.updates += 1
        held = {self._masters[name] for name in self.withheld if name in self._masters}
        if self.guards.resets(self.updates):
            for master in self._names:
                state = self.state[master]
                torch._foreach_zero_([moment for name, moment in state.items() if name != COMPENSATION])
        factor = self._guarded(held, factor)
        self._renew(held, factor)
        parts = []
        for group in self.param_groups:
            group["step"] = self.guards.age(self.updates)
            masters = [p for p in group["params"] if p.grad is not None and p not in held]
            if masters:
                parts.append((masters, group))
        if self.config.is_plain:
            for masters, group in parts:
                self._apply(masters, group, factor)
        else:
            self._apply_rules(parts, factor)
        if self.after_update is not None:
            self.guards.told |= self.after_update()
        self._round_weights()
        self.publish()

    def _round_weights(self) -> None:
        """Where the masters exist in name only, round them to values that bf16 holds."""
        if self._kept == "masters":
            return
        compensations = [self.state[p][COMPENSATION] for p in self._names if COMPENSATION in self.state[p]]
        round_weights(list(self._names), compensations, self._kept, seed=self._seed, update=self.updates)

    def _guarded(self, held: Set[nn.Parameter], factor: float) -> float:
        """Let the guards clip the gradients to apply. Returns the remaining factor of the global clip."""
        if not self.guards.clips:
            return factor
        assert self._summary is not None
        applied = {n: p for p, n in self._names.items() if p.grad is not None and p not in held}
        return self.guards.clip(
            {name: p.grad for name, p in applied.items() if p.grad is not None},
            self._summary.norms,
            {name: self.state[p].get(MOMENTS[1], p) for name, p in applied.items()},
            factor=factor,
            updates=self.updates,
            epsilon=self.config.epsilon,
        )

    def _apply_rules(self, parts: list[tuple[list[nn.Parameter], dict[str, Any]]], factor: float) -> None:
        """Move weights by their rules' directions; clips gradients in place."""
        config, t = self.config, self.guards.age(self.updates)
        directions, gradients = directions_of(parts, self._names, self.state, self._rows, factor, t, config)
        if config.cautious:
            make_cautious(directions, gradients, self._whole_sizes(), self._total)
        if config.guard.update_norm:
            deviations = config.guard.update_norm
            share = bound_update(directions, self._update_norms, deviations, self._total)
            self.guards.told["guard/-/update_norm_factor"] = share
        for masters, group in parts:
            decay = self._decay(group)
            for p in masters:
                direction = directions[self._names[p]]
                take_off(p, direction, rate=group["lr"], decay=decay, cautious=config.cautious_decay)

    def _decay(self, group: Mapping[str, Any]) -> float:
        """The share of a weight of the group that this update's decay takes off."""
        factor: float = group["rate_factor"]
        return factor * decay_share(
            self.config, self._rate, self._peak, group["weight_decay"], leads_out=group["leads_out"]
        )

    def _total(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """From sums over this process's tensors, those over the whole tensors of the whole model."""
        return sums

    def _whole_sizes(self) -> Mapping[str, int]:
        """Elements of the whole tensors."""
        return {name: master.numel() for name, master in self._masters.items()}

    def _renew(self, held: Set[nn.Parameter], factor: float) -> None:
        """Set the second moments in ``renewed`` to what this gradient alone would make them."""
        for name in self.renewed:
            master = self._masters.get(name)
            if master is None or master in held or master.grad is None or self.config.beta2 == 0:
                continue
            if MOMENTS[1] in self.state[master]:
                past = renewed(master.grad * factor, self.guards.age(self.updates), self.config)
                self.state[master][MOMENTS[1]].copy_(past)
        self.renewed = frozenset()

    def _apply(self, masters: list[nn.Parameter], group: Mapping[str, Any], factor: float) -> None:
        """Move some weights by their gradients; clips these in place."""
        decay = None if self.config.decay == "coupled" else self._decay(group)
        age = self.guards.age(self.updates)
        apply_adamw(masters, self.state, group, factor, age, self.config, decay=decay, rates=self._rates)

    def _rates(
        self, rate: float, gradients: list[Tensor], second: list[Tensor], correction2: float
    ) -> list[float]:
        """StableAdamW's learning rate of each tensor (``fused.stable_rates``)."""
        return stable_rates(rate, gradients, second, correction2, self.config.epsilon)

    def _clip_factor(self, norm: float) -> float:
        bound = self._clip or math.inf
        if self.config.zclip:
            bound = min(bound, self._zclip.bound(norm))
            self._zclip.remember(min(norm, bound))
        return bound / (norm + 1e-6) if norm > bound else 1.0

    def coming_factor(self) -> float:
        """The factor by which clipping will multiply the gradient that ``gradients`` summed up."""
        if self._summary is None:
            raise RuntimeError("call gradients() before coming_factor()")
        bound, norm = self._clip or math.inf, self._summary.global_norm
        if self.config.zclip:
            bound = min(bound, self._zclip.bound(norm))
        return bound / (norm + 1e-6) if norm > bound else 1.0

    def publish(self) -> None:
        """Round the masters into the half-precision weights."""
        if self.policy.has_masters:
            torch._foreach_copy_(list(self._live.values()), list(self._masters.values()))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for live in self._live.values():
            live.grad = None
        for master in self._masters.values():
            master.grad = None
        self._accumulated.clear()
        self._summary = None

    # ---------------------------------------------------------------------------------------------------- state

    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights by parameter name, live."""
        return dict(self._masters)

    def moments(self) -> dict[str, Tensor]:
        """The moments as ``<moment>/<parameter>``, live."""
        return {
            f"{moment}/{name}": tensor
            for name, master in self._masters.items()
            for moment, tensor in self.state[master].items()
        }

    @torch.no_grad()
    def load(self, *, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Load weights and moments; the half-precision weights follow."""
        for own, given in ((self.masters(), masters), (self.moments(), moments)):
            for name, tensor in own.items():
                tensor.copy_(given[name])
        self.publish()

    def counters(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""
        return {
            "updates": self.updates,
            **self._zclip.state_dict(),
            **({"guards": guards} if (guards := self.guards.state_dict()) else {}),
            **({"update_norms": self._update_norms.state()} if len(self._update_norms) else {}),
        }

    def load_counters(self, state: Mapping[str, Any]) -> None:
        """Restore what ``counters`` gave."""
        self.updates = state["updates"]
        for group in self.param_groups:
            group["step"] = self.guards.age(self.updates)
        self._zclip.load_state_dict(state)
        self.guards.load_state_dict(state.get("guards", {}))
        self._update_norms.load(state.get("update_norms", []))

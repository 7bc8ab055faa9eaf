"""AdamW on fp32 masters, with clipping whose norms are telemetry.

For gradient g (unscaled, clipped by min(1, clip / |g|) over all parameters together), step t from 1, betas b1, b2:

    m = b1 m + (1 - b1) g                v = b2 v + (1 - b2) g^2
    w = w - rate wd w - rate / c  m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

(Loshchilov and Hutter, 1711.05101.) w are fp32 masters; a half-precision model's weights are those, rounded, after every update.
c is 1, or with ``update_clipping`` max(1, RMS_t), RMS_t = sqrt(mean(g^2 / max(v, eps^2))) per tensor: StableAdamW (2304.13013,
section 3.4). ``zclip`` bounds the norm by an exponential mean and deviation of its past instead of a constant (2504.02507): a norm
z > 2.5 deviations above the mean is clipped to mean + 2.5^2 / z deviations. A non-finite norm is not taken into that past.

Parameters that are ``withheld`` keep master, weight and both moments to the last bit; the others are updated as they would be,
by the same clipping factor. Renewed second moments forget their past: v is set so that this update's v / (1 - b2^t) is g^2.

Norms are computed once a step, per tensor; the global one follows from them, and telemetry gets them for nothing. A gradient that
is not finite is not applied. The update is torch's fused kernel: one pass over weight, gradient and moments, clipping included.
Groups carry ``betas``, ``eps`` and ``step`` as torch's own optimizers do, so that instruments can correct the moments' bias.

Limits: one device; decay applies to matrices, not to biases, norms and other vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glm.errors import InputError
from glm.precision import Policy

MOMENTS = ("exp_avg", "exp_avg_sq")
ZCLIP_DECAY = 0.97
ZCLIP_DEVIATIONS = 2.5
ZCLIP_WARMUP = 25


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Constants of AdamW and of clipping.

    Attributes:
        beta1, beta2, epsilon: AdamW's.
        weight_decay: decoupled, on matrices.
        clip: bound of the global gradient norm; 0 is off.
        zclip: bound it by its own past as well.
        update_clipping: StableAdamW's per-tensor rate.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    zclip: bool = False
    update_clipping: bool = False

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.epsilon > 0:
            raise InputError(f"optimizer.epsilon must be positive, got {self.epsilon}")
        if self.weight_decay < 0 or self.clip < 0:
            raise InputError("optimizer.weight_decay and optimizer.clip must be 0 (off) or positive")


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientSummary:
    """Norms of a step's gradient, unscaled and not clipped.

    Attributes:
        global_norm: over all parameters; inf or nan if any element is.
        norms: one fp32 scalar a parameter, by name.
        gradients: the unscaled fp32 gradients by name; live until ``zero_grad``.
        accumulated: this process's own as the backward passes left them: in the format they are accumulated in, loss scale
            included; live until ``zero_grad``.
    """

    global_norm: float
    norms: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    accumulated: Mapping[str, Tensor]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.global_norm)


class MixedPrecisionAdamW(torch.optim.Optimizer):
    """AdamW over a model's parameters.

    The model must be in fp32 when given; for a half-precision policy it is cast here, its fp32 weights becoming the masters.

    Args:
        model: its parameters, by name.
        config: constants.
        policy: number formats.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, policy: Policy) -> None:
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
        decayed = {name for name, live in self._live.items() if live.dim() >= 2}
        groups = [
            {
                "params": [m for n, m in self._masters.items() if n in decayed],
                "weight_decay": config.weight_decay,
            },
            {"params": [m for n, m in self._masters.items() if n not in decayed], "weight_decay": 0.0},
        ]
        constants = {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": config.epsilon, "step": 0}
        super().__init__([group for group in groups if group["params"]], constants)
        for master in self._masters.values():
            self.state[master] = {moment: torch.zeros_like(master) for moment in MOMENTS}
        self._accumulated: dict[str, Tensor] = {}
        self._summary: GradientSummary | None = None
        self._clip = config.clip
        # Names of the parameters that updates leave alone, and of those whose second moments the next one begins anew.
        self.withheld: frozenset[str] = frozenset()
        self.renewed: frozenset[str] = frozenset()
        self.updates = 0
        self._norm_mean = self._norm_variance = 0.0
        self._norms_seen = 0

    def _make_masters(self, initial: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """What is updated, by parameter name: copies of ``initial`` in fp32, or the weights themselves if that is empty."""
        return {
            name: nn.Parameter(initial[name], requires_grad=live.requires_grad) if initial else live
            for name, live in self._live.items()
        }

    # ------------------------------------------------------------------------------------------------ gradients

    def accumulate(self) -> None:
        """After a micro-batch's backward pass. Half gradients move into fp32 where the policy accumulates there."""
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

    def _found(self) -> dict[str, Tensor]:
        """The accumulated gradient of each master, in fp32."""
        return {name: gradient.float() for name, gradient in self.accumulated().items()}

    def accumulated(self) -> dict[str, Tensor]:
        """The gradients of the micro-batches so far, in the format they are accumulated in, loss scale included."""
        if self.policy.accumulates_in_fp32:
            return self._accumulated
        return {name: live.grad for name, live in self._live.items() if live.grad is not None}

    def _norms(self, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """Norms by parameter, and over all."""
        norms = dict(zip(found, torch._foreach_norm(list(found.values())), strict=True)) if found else {}
        return norms, float(torch.linalg.vector_norm(torch.stack(list(norms.values())))) if norms else 0.0

    # --------------------------------------------------------------------------------------------------- update

    def step_with(self, rate: float, *, clip: float) -> bool:
        """Clip and apply the gradient that ``gradients`` summed up. False: it was not finite, nothing was changed.

        Args:
            rate: learning rate of this update.
            clip: bound of the global norm; 0 is off.
        """
        if self._summary is None:
            raise RuntimeError("call gradients() before step_with()")
        if not self._summary.is_finite:
            return False
        for group in self.param_groups:
            group["lr"] = rate
        self._clip = clip
        self.step()
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the gradient. Hooks registered on the optimizer run around it."""
        assert closure is None
        assert self._summary is not None
        factor = self._clip_factor(self._summary.global_norm)
        self.updates += 1
        held = {self._masters[name] for name in self.withheld if name in self._masters}
        self._renew(held, factor)
        for group in self.param_groups:
            group["step"] = self.updates
            masters = [p for p in group["params"] if p.grad is not None and p not in held]
            if masters:
                self._apply(masters, group, factor)
        self._publish()

    def _renew(self, held: Set[nn.Parameter], factor: float) -> None:
        """Let the second moments in ``renewed`` be what this gradient alone would make them."""
        beta2 = self.config.beta2
        correction2 = 1 - beta2**self.updates
        for name in self.renewed:
            master = self._masters.get(name)
            if master is None or master in held or master.grad is None or beta2 == 0:
                continue
            # b2 v + (1 - b2) g^2 = (1 - b2^t) g^2; at t = 1 v is 0 as ever.
            share = (correction2 - (1 - beta2)) / beta2
            self.state[master][MOMENTS[1]].copy_((master.grad * factor).square() * share)
        self.renewed = frozenset()

    def _apply(self, masters: list[Tensor], group: Mapping[str, Any], factor: float) -> None:
        """Move some weights by their gradients, which are clipped in place."""
        config = self.config
        gradients = [p.grad for p in masters if p.grad is not None]  # every one of them has one
        first, second = ([self.state[p][moment] for p in masters] for moment in MOMENTS)
        device = masters[0].device
        scale = None
        if config.update_clipping:
            # The rates hang on the second moment that the update is about to make.
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            coming = list(torch._foreach_mul(second, config.beta2))
            torch._foreach_addcmul_(coming, gradients, gradients, 1 - config.beta2)
            rates = self._rates(group["lr"], gradients, coming, 1 - config.beta2**self.updates)
            calls = [(slice(i, i + 1), rate) for i, rate in enumerate(rates)]
        else:
            if factor != 1.0:
                scale = torch.tensor(1.0 / factor, device=device)  # the kernel divides by it
            calls = [(slice(None), group["lr"])]
        step = torch.tensor(float(self.updates), device=device)
        for part, rate in calls:
            torch._fused_adamw_(
                masters[part],
                gradients[part],
                first[part],
                second[part],
                [],
                [step] * len(masters[part]),
                lr=rate,
                beta1=config.beta1,
                beta2=config.beta2,
                weight_decay=group["weight_decay"],
                eps=config.epsilon,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
            )

    def _rates(
        self, rate: float, gradients: list[Tensor], second: list[Tensor], correction2: float
    ) -> list[float]:
        """StableAdamW's learning rate of each tensor.

        Args:
            rate: before clipping.
            gradients, second: g and the second moment that it is part of, both of update t.
            correction2: 1 - b2^t.
        """
        least = self.config.epsilon**2
        ratios = [
            (g.square() / (v / correction2).clamp_min(least)).mean()
            for g, v in zip(gradients, second, strict=True)
        ]
        return [rate / max(1.0, math.sqrt(ratio)) for ratio in torch.stack(ratios).tolist()]

    def _clip_factor(self, norm: float) -> float:
        bound = self._clip or math.inf
        if self.config.zclip:
            bound = min(bound, self._zclip_bound(norm))
            self._remember(min(norm, bound))
        return bound / (norm + 1e-6) if norm > bound else 1.0

    def _zclip_bound(self, norm: float) -> float:
        deviation = math.sqrt(self._norm_variance)
        if self._norms_seen < ZCLIP_WARMUP or deviation == 0.0:
            return math.inf
        z = (norm - self._norm_mean) / deviation
        return math.inf if z <= ZCLIP_DEVIATIONS else self._norm_mean + ZCLIP_DEVIATIONS**2 / z * deviation

    def _remember(self, norm: float) -> None:
        gain = max(1 - ZCLIP_DECAY, 1 / (self._norms_seen + 1))
        difference = norm - self._norm_mean
        self._norm_mean += gain * difference
        self._norm_variance = (1 - gain) * (self._norm_variance + gain * difference**2)
        self._norms_seen += 1

    def _publish(self) -> None:
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
            f"{m}/{name}": self.state[master][m] for name, master in self._masters.items() for m in MOMENTS
        }

    @torch.no_grad()
    def load(self, *, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Take weights and moments; the half-precision weights follow."""
        for own, given in ((self.masters(), masters), (self.moments(), moments)):
            for name, tensor in own.items():
                tensor.copy_(given[name])
        self._publish()

    def counters(self) -> dict[str, Any]:
        """The rest of the state, as JSON can hold it."""
        return {
            "updates": self.updates,
            "norm_mean": self._norm_mean,
            "norm_variance": self._norm_variance,
            "norms_seen": self._norms_seen,
        }

    def load_counters(self, state: Mapping[str, Any]) -> None:
        """Take back what ``counters`` gave."""
        self.updates = state["updates"]
        for group in self.param_groups:
            group["step"] = self.updates
        self._norm_mean, self._norm_variance = state["norm_mean"], state["norm_variance"]
        self._norms_seen = state["norms_seen"]

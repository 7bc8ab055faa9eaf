"""The curvature of the loss along the coming update, and hence how much higher a learning rate the run would tolerate.

Adam steps along d = P^-1 g, P = sqrt(v / (1 - b2^t)) + eps. In P's own metric the curvature along d is

    lambda = d'Hd / d'Pd             Hd = (grad(w + r d) - grad(w)) / r,   r |d| = ``STEP`` |w|

A quadratic is stable under the update with first-moment coefficient b1 and rate eta as long as its curvature stays below

    threshold = (2 + 2 b1) / ((1 - b1) eta)           38 / eta at b1 = .9      margin = threshold / lambda

(Cohen et al., Adaptive gradient methods at the edge of stability, 2207.14484; spikes follow when the curvature exceeds it:
2506.04805.) A margin of 1.6 means that the run tolerates 1.6 times its rate. While it stays below 1 the component along d grows
from step to step. For SGD P = 1 and, with momentum m <- b1 m + (1 - dampening) g, threshold = (2 + 2 b1) / ((1 - dampening) eta).
Parameters with their own rate count with that rate. lambda is a Rayleigh quotient, at most the largest eigenvalue of P^-1 H: the
margin is an upper bound.

A measured step takes one more forward and backward pass of the same batch, at shifted weights. ``backward`` makes it:

    probe = CurvatureProbe(lambda: loss_of(batch).backward())        # batch: the step's own, all micro-batches of it
    Monitor(..., probes=[*all_probes(), probe], schedule=Schedule(every=10, probes={"curvature": 50}))

The probe restores weights, buffers, gradients and random states to the last bit, the other probes do not see the pass, and dropout
draws the masks that the step drew. The probe measures once the gradients are complete, not yet clipped.

Family ``curvature``, site = ``-``:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| preconditioned | lambda above | 1 / rate | arXiv:2207.14484 |
| threshold | the largest stable curvature at the present rate; NaN where the rate is 0 | 1 / rate | arXiv:2207.14484 |
| margin | threshold / lambda; infinite where lambda is not positive | 1 | arXiv:2506.04805 |

Limits: the difference of two gradients needs fp32, so the probe leaves out half-precision weights; one process; one optimizer, Adam
or SGD: for others, whose steps have other thresholds, it records nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.model_structure import named_modules
from stabilitylab.probes.base import Found, Readings
from stabilitylab.probes.hooking import HookingProbe
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.telemetry import RUN_SITE, Key

STATISTICS = ("preconditioned", "threshold", "margin")
STEP = 1e-3
ADAMS = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
IN_A_ROW = 2


class CurvatureProbe(HookingProbe):
    """Curvature along the coming update; see the module's docstring.

    Args:
        backward: computes the present batch's loss at the present weights, and its backward pass.
        at_risk: a margin; two measurements in a row below it make an event ``at-risk``, once until the margin rises above it again.
            None: no event, since it would be wrong more often than an alarm may be (docs/attribution.md).
    """

    name = "curvature"
    # It makes a pass of its own, and so keeps its cadence under a recorder.
    is_costly = True
    # Compiled graphs need not hold the hook: any pass may show where random numbers stood.
    stays_in_graphs = False

    def __init__(self, backward: Callable[[], object], *, at_risk: float | None = None) -> None:
        if at_risk is not None and not at_risk > 0:
            raise InputError(f"at_risk is a margin, over 0, got {at_risk}")
        super().__init__()
        self._backward, self._at_risk = backward, at_risk
        # Measurements in a row below the margin; only the sink thread uses it.
        self._below = 0
        self._slots: Slots | None = None
        self._randomness: list[Tensor] = []
        self._keys = tuple(Key("curvature", RUN_SITE, name) for name in STATISTICS)

    def _begin(self, measured: bool) -> None:
        self._randomness = []

    def _hook(self) -> None:
        for _, module in named_modules(self._context.model):
            self._before_forward(module, self._guarded(self._remember))

    def _remember(self, *given: object) -> None:
        """Keep the random state with which a measured step's forward pass begins."""
        if not self._randomness:
            cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
            self._randomness = [torch.get_rng_state(), *cuda]

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float | Slots
    ) -> None:
        """Measure the curvature, with these gradients as the step's own."""
        optimizer, context = self._context.optimizer, self._context
        if not self._armed or optimizer is None or not gradients:
            return
        chosen = _directions(optimizer, context.parameters, gradients)
        if chosen is None:
            return
        parameters, directions, weighted, threshold = chosen
        names = {id(p): name for name, p in context.parameters.items()}
        own = [gradients[names[id(p)]].detach().float() for p in parameters]
        if isinstance(scale, Slots):
            factor = context.buffer.view(scale)[0].float()
            own = [g / factor for g in own]
        elif scale != 1.0:
            own = [g / scale for g in own]
        there = self._elsewhere(parameters, directions)
        if there is None:
            return
        gradients_there, r = there
        bent = _dot([a - b for a, b in zip(gradients_there, own, strict=True)], directions) / r
        quotient = bent / _dot(weighted, directions)
        slots = self._slots
        if slots is None or slots.device != quotient.device:
            slots = self._slots = context.buffer.reserve("replicated", 2, quotient.device)
        slots.stamp = -1
        context.buffer.put(slots, torch.stack([quotient, torch.full_like(quotient, threshold)]).double())

    def _elsewhere(
        self, parameters: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor] | None:
        """The gradient of the same batch at w + r d, and r; restores everything afterwards."""
        context, model = self._context, self._context.model
        kept = [p.detach().clone() for p in parameters]
        held = [(p, p.grad) for p in context.parameters.values()]
        buffers = [(b, b.detach().clone()) for b in model.buffers()]
        now = [torch.get_rng_state()]
        now += torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        size = torch.sqrt(_dot(kept, kept) / _dot(directions, directions).clamp_min(1e-30))
        r = STEP * size
        context.muted = True
        try:
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p.add_(r * d)
            for p, _ in held:
                p.grad = None
            _put_randomness(self._randomness or now)
            with (
                torch.enable_grad()
            ):  # gradients may come from where grad mode is off, as inside torch's clipping
                self._backward()
            found = [p.grad.detach().float() for p in parameters if p.grad is not None]
            return (found, r) if len(found) == len(parameters) else None
        finally:
            with torch.no_grad():
                for p, old in zip(parameters, kept, strict=True):
                    p.copy_(old)
                for buffer, value in buffers:
                    buffer.copy_(value)
            for p, gradient in held:
                p.grad = gradient
            _put_randomness(now)
            context.muted = False

    def collect(self) -> Found | None:
        """The step's curvature, if measured."""
        if self._slots is None or self._slots.stamp != self._context.buffer.stamp:
            return None
        return Found(sites=(RUN_SITE,), slots=[(self._slots,)])

    def finish(self, gathered: Gathered) -> Readings:
        """The table's statistics."""
        curvature, threshold = (float(x) for x in gathered.rows()[0])
        margin = threshold / curvature if curvature > 0 else math.inf if curvature <= 0 else math.nan
        return Readings(self._keys, np.array([curvature, threshold, margin]), self._risk(margin))

    def _risk(self, margin: float) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        if self._at_risk is None:
            return ()
        self._below = self._below + 1 if margin < self._at_risk else 0
        return (("at-risk", {"margin": margin, "below": self._at_risk}),) if self._below == IN_A_ROW else ()


def _directions(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], float] | None:
    """Parameters, d, Pd, and the threshold; None without a basis for them: no gradient, no moments yet, half precision."""
    by_id, states = {id(p): name for name, p in names.items()}, optimizer.state
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    most = max(rates, default=0.0)
    parameters, directions, weighted = [], [], []
    beta1, share = 0.0, 1.0
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        for p in group["params"]:
            name = by_id.get(id(p))
            if name is None or name not in gradients or not rate > 0:
                continue
            if p.dtype not in (torch.float32, torch.float64) or type(p.data) is not Tensor:
                return None
            g, state = gradients[name].detach().float(), states.get(p, {})
            second, betas = state.get("exp_avg_sq"), group.get("betas")
            if isinstance(second, Tensor) and betas:
                if _more_than_adam(state):
                    return None
                step = float(state.get("step", group.get("step", 0)))
                if step < 1:
                    return None
                precondition = (second / (1 - betas[1] ** step)).sqrt() + float(group.get("eps", 1e-8))
                beta1, share = betas[0], 1 - betas[0]
            elif betas:
                return None  # Adam before its first step, or a rule of another kind
            else:
                precondition = torch.ones_like(g)
                beta1, share = float(group.get("momentum", 0.0)), 1.0 - float(group.get("dampening", 0.0))
            precondition = precondition * (most / rate)
            parameters.append(p)
            directions.append(g / precondition)
            weighted.append(g)
    if not parameters or not most > 0:
        return None
    return parameters, directions, weighted, (2 + 2 * beta1) / (share * most)


def _more_than_adam(state: Mapping[str, Any]) -> bool:
    """Whether an optimizer keeps tensors that Adam does not: a basis for v (SOAP), a second momentum (AdEMAMix)."""
    others = (value for name, value in state.items() if name not in ADAMS)
    return any(isinstance(value, (Tensor, list, tuple, dict)) and _size(value) > 1 for value in others)


def _size(value: Tensor | list[Any] | tuple[Any, ...] | dict[str, Any]) -> int:
    return value.numel() if isinstance(value, Tensor) else len(value)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack(
        [torch.dot(x.flatten().double(), y.flatten().double()) for x, y in zip(a, b, strict=True)]
    ).sum()


def _put_randomness(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all([*states[1:]])

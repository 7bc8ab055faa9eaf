"""Finds Adam's moments in an optimizer's state, and whether they still have their initial bias.

torch's Adam keeps v_t = beta2 v_(t-1) + (1 - beta2) g^2, at first too small by a factor 1 - beta2^t; others (pytorch-optimizer's
StableAdamW, heavyball's) keep it with that divided out, by a beta2 that grows with t. No name tells which, but one step does: in

    share = (v_t - v_(t-1)) / (g^2 - v_(t-1))        of an element; v_0 = 0

the first kind has 1 - beta2 and the second (1 - beta2) / (1 - beta2^t), exactly, in every element and for any gradient. Where the
quartiles over elements are near neither (another basis, scale or gradient), this v is no mean of g^2, and nothing may compare the
two; where no element has moved yet, not in that step. After some 1 / (1 - beta2) steps the kinds agree, and the check ends.

Moments are found by name, ``exp_avg_sq`` and ``exp_avg``, alone or inside another name, one level down or two (heavyball:
``state[0]["update_by_adam_exp_avg_sq_0"]``), or ``state1`` and ``state2`` (bitsandbytes), where they have as many elements as the
parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stabilitylab.probes.gradients import local_part
from stabilitylab.statistics.updates import AdamMoments

SECOND, FIRST = "exp_avg_sq", "exp_avg"
ALIKE = 0.5  # of 1 - beta2^t: from there on the bias is no more than a factor of sqrt(2) in an RMS
NEAR = 1.4  # less than the root of the least factor between the two kinds, 1 / ALIKE
SAMPLED, TRIED = 64, 4


class SecondMoments:
    """Reads moments, and learns from an optimizer's first measured step how it keeps v."""

    def __init__(self) -> None:
        # For each parameter group, by id (held here, so that no other group gets that id): whether v has its bias. None: v is
        # no mean of g^2.
        self._kinds: dict[int, tuple[Mapping[str, Any], bool | None]] = {}
        self._before: dict[int, Tensor | None] = {}

    def before(self, p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> None:
        """Keep a sample of a parameter's v before the optimizer's step, if still needed."""
        if id(group) in self._kinds or len(self._before) >= TRIED:
            return
        found = _found(p, state)
        self._before[id(p)] = None if found is None else _sample(found[1]).clone()

    def is_learning(self, group: Mapping[str, Any]) -> bool:
        """Whether this group's kind is not known yet."""
        return id(group) not in self._kinds

    def read(
        self, p: Tensor, gradient: Tensor | None, state: Mapping[str, Any], group: Mapping[str, Any]
    ) -> AdamMoments | None:
        """A parameter's moments after the step; None if there are none. Their correction is NaN where v is no mean of g^2."""
        found, beta2 = _found(p, state), _beta2(group)
        if found is None or beta2 is None:
            return None
        first, second, is_decoded = found
        step, epsilon = _step(state, group), group.get("eps") or 1e-8
        grown = None if step is None else 1.0 - beta2**step
        kind = self._kind(p, gradient, second, group, beta2, grown)
        correction = math.nan if kind is None else 1.0 if grown is None or not kind else grown
        # CAME has two, neither of which is added to sqrt(v).
        if not isinstance(epsilon, (float, int, Tensor)):
            correction, epsilon = math.nan, math.nan
        return AdamMoments(
            first=first, second=second, correction=correction, epsilon=float(epsilon), is_decoded=is_decoded
        )

    def done(self) -> None:
        """End the step: drop what was kept for it."""
        self._before.clear()

    def _kind(
        self,
        p: Tensor,
        gradient: Tensor | None,
        second: Tensor,
        group: Mapping[str, Any],
        beta2: float,
        grown: float | Tensor | None,
    ) -> bool | None:
        if (known := self._kinds.get(id(group))) is not None:
            return known[1]
        if grown is None or not 0.0 < beta2 < 1.0:
            return True
        if id(p) not in self._before or gradient is None or gradient.layout is not torch.strided:
            return True
        # Once per run and group: on an accelerator this waits for the step.
        grown = float(grown)
        if grown >= ALIKE:
            kind: bool | None = True
        else:
            shares = _shares(self._before[id(p)], _sample(second), _sample(gradient))
            if not len(shares):  # no gradient came here
                return True
            if not shares.any():
                return None
            kind = None
            for has_bias, expected in ((True, 1 - beta2), (False, (1 - beta2) / grown)):
                ratio = shares.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=shares.dtype)) / expected
                if bool((ratio > 1 / NEAR).all() and (ratio < NEAR).all()):
                    kind = has_bias
                    break
        self._kinds[id(group)] = group, kind
        return kind


def _shares(before: Tensor | None, after: Tensor, gradient: Tensor) -> Tensor:
    """For each element that shows it, the share of g^2 that came into v; on the host."""
    old = torch.zeros_like(after) if before is None else before
    apart = gradient.square() - old
    told = apart != 0
    return ((after - old)[told] / apart[told]).cpu()


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)].double()


def _step(state: Mapping[str, Any], group: Mapping[str, Any]) -> float | Tensor | None:
    """The number of steps done: torch keeps it with the parameter, fused optimizers with the group."""
    step = state.get("step", group.get("step"))
    if isinstance(step, Tensor):
        # One on an accelerator stays there: reading it would wait for the device.
        return float(step) if step.device.type == "cpu" else step
    return None if step is None else float(step)


def _beta2(group: Mapping[str, Any]) -> float | None:
    """The share of v that a step keeps: of the pair of them, or by itself (optimi's, but for Adan, whose v has beta3)."""
    betas = group.get("betas")
    if isinstance(betas, (tuple, list)) and len(betas) > 1:
        return float(betas[1])
    beta2 = None if "beta3" in group else group.get("beta2")
    return None if beta2 is None else float(beta2)


def _found(p: Tensor, state: Mapping[str, Any]) -> tuple[Tensor, Tensor, bool] | None:
    """First and second moment, this rank's parts, and whether they were decoded."""
    count = local_part(p.detach())[0].numel()
    for first, second in _named(state):
        if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
            continue
        first, second = local_part(first)[0], local_part(second)[0]
        if not (first.numel() == second.numel() == count):
            continue
        if _is_code(first) or _is_code(second):
            # torchao's low-bit optimizers.
            first, second = first.dequantize(), second.dequantize()
            return first, second, True
        if _holds_numbers(first) and _holds_numbers(second):
            return first, second, False
    return None


def _named(state: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """What the state holds under the names of first and second moments."""
    for inner in (state,) if SECOND in state else _levels(state, 2):
        names = [SECOND] if SECOND in inner else [n for n in inner if isinstance(n, str) and SECOND in n]
        for name in sorted(names, key=len):  # AMSGrad's maximum of v is called max_exp_avg_sq
            yield inner.get(name.replace(SECOND, FIRST)), inner[name]
    yield state.get("state1"), state.get("state2")


def _is_code(moment: Tensor) -> bool:
    """Whether codes and scales lie in one object, which gives its numbers by ``dequantize``."""
    return type(moment).dequantize is not Tensor.dequantize


def _holds_numbers(moment: Tensor) -> bool:
    """Whether a moment's elements are its numbers; those of eight bits are codes, whose scales lie elsewhere (FlashAdamW)."""
    return moment.is_floating_point() and moment.itemsize > 1


def _levels(state: Mapping[str, Any], below: int) -> Iterator[Mapping[str, Any]]:
    yield state
    if below:
        for inner in state.values():
            if isinstance(inner, Mapping):
                yield from _levels(inner, below - 1)

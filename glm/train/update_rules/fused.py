"""AdamW's common case: torch's fused kernel, and StableAdamW's rates.

The kernel makes one pass over weight, gradient and moments, with clipping. With StableAdamW the rate of each tensor depends on the
second moment that the update is about to make (2304.13013, section 3.4), so clipping comes before and tensors go one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glm.train.update_rules.adam import MOMENTS
from glm.train.update_rules.config import OptimizerConfig

# Rate, gradients, coming second moments, 1 - b2^t -> rate of each tensor.
Rates = Callable[[float, list[Tensor], list[Tensor], float], list[float]]


def apply_adamw(
    masters: Sequence[nn.Parameter],
    states: Mapping[Any, Mapping[str, Tensor]],
    group: Mapping[str, Any],
    factor: float,
    t: int,
    config: OptimizerConfig,
    *,
    decay: float | None,
    rates: Rates,
) -> None:
    """Move some weights by their gradients; clips these in place.

    Args:
        masters: all have gradients.
        states: their moments.
        group: their settings.
        factor: of the clip.
        t: number of the update.
        decay: the share that it takes off a weight; None: the group's, times the rate.
        rates: computes StableAdamW's, of tensors that may be shares.
    """
    gradients = [p.grad for p in masters if p.grad is not None]
    first, second = ([states[p][moment] for p in masters] for moment in MOMENTS)
    scale = None
    if config.update_clipping:
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        coming = list(torch._foreach_mul(second, config.beta2))
        torch._foreach_addcmul_(coming, gradients, gradients, 1 - config.beta2)
        own_rates = rates(group["lr"], gradients, coming, 1 - config.beta2**t)
        calls = [(slice(i, i + 1), rate) for i, rate in enumerate(own_rates)]
    else:
        if factor != 1.0:
            # The kernel divides by it. (Filled on the device: copying it there would wait.)
            scale = torch.full((), 1.0 / factor, device=masters[0].device)
        calls = [(slice(None), group["lr"])]
    # The kernel multiplies it by the rate; the other kinds of decay do not.
    share = group["weight_decay"] if decay is None else decay / group["lr"]
    for part, rate in calls:
        own = masters[part], gradients[part], first[part], second[part]
        fused_adamw(*own, t, rate=rate, decay=share, scale=scale, config=config)


def renewed(gradient: Tensor, t: int, config: OptimizerConfig) -> Tensor:
    """The second moment before update t that makes its v / (1 - b2^t) the gradient's square alone; b2 > 0."""
    # b2 v + (1 - b2) g^2 = (1 - b2^t) g^2; at t = 1 v is 0 as ever.
    share = (1 - config.beta2**t - (1 - config.beta2)) / config.beta2
    return gradient.square() * share


def stable_rates(
    rate: float, gradients: list[Tensor], second: list[Tensor], correction2: float, epsilon: float
) -> list[float]:
    """StableAdamW's learning rate of each tensor.

    Args:
        rate: before clipping.
        gradients, second: g and the second moment that includes it, both of update t.
        correction2: 1 - b2^t.
        epsilon: eps.
    """
    ratios = [
        (g.square() / (v / correction2).clamp_min(epsilon**2)).mean()
        for g, v in zip(gradients, second, strict=True)
    ]
    return [rate / max(1.0, math.sqrt(ratio)) for ratio in torch.stack(ratios).tolist()]


def fused_adamw(
    weights: Sequence[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    t: int,
    *,
    rate: float,
    decay: float,
    scale: Tensor | None,
    config: OptimizerConfig,
) -> None:
    """AdamW's update t in one pass of torch's kernel: moves weights and moments in place, divides gradients by ``scale``."""
    step = torch.full((), float(t), device=weights[0].device)
    torch._fused_adamw_(
        [*weights],
        gradients,
        first,
        second,
        [],
        [step] * len(gradients),
        lr=rate,
        beta1=config.beta1,
        beta2=config.beta2,
        weight_decay=decay,
        eps=config.epsilon,
        amsgrad=False,
        maximize=False,
        grad_scale=scale,
    )

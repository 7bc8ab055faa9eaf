"""Adam's kin: elementwise rules of two or three moments.

    m = b1 m + (1 - b1) g       v = b2 v + (1 - b2) g^2       m^ = m / (1 - b1^t)       v^ = v / (1 - b2^t)

    adamw         u = m^ / (sqrt v^ + eps)                                        Loshchilov and Hutter, 1711.05101
    adam-atan2    u = 1.27 atan2(m^, sqrt v^): no eps, |u| < 2, any scale of g    Everett et al., 2407.05872, section 6
    ademamix      u = (m^ + a s) / (sqrt v^ + eps),  s = b3 s + (1 - b3) g        Pagliardini et al., 2409.03137, section 3
    lion          u = sign(b1 m + (1 - b1) g),  m = b2 m + (1 - b2) g             Chen et al., 2302.06675, program 1

AdEMAMix's a rises linearly to its value, b3 from b1 so that its half-life does, over ``slow.warmup`` updates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm.train.update_rules.config import OptimizerConfig
from glm.train.update_rules.rule import Tensors, UpdateRule

# 4 / pi: the slope of 1.27 atan2(x, 1) at 0 is near Adam's, and its bound near 2.
ATAN2_FACTOR = 1.27


def _take_in(tensors: Tensors, t: int, config: OptimizerConfig) -> tuple[list[Tensor], list[Tensor]]:
    """Advance both moments; returns m^ and sqrt v^."""
    gradients = list(tensors.gradients)
    first, second = ([state[name] for state in tensors.states] for name in ("exp_avg", "exp_avg_sq"))
    torch._foreach_lerp_(first, gradients, 1 - config.beta1)
    torch._foreach_mul_(second, config.beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - config.beta2)
    mean = list(torch._foreach_div(first, 1 - config.beta1**t))
    size = list(torch._foreach_sqrt(second))
    torch._foreach_div_(size, math.sqrt(1 - config.beta2**t))
    return mean, size


def adamw(tensors: Tensors, t: int, config: OptimizerConfig) -> list[Tensor]:
    """u of AdamW; advances both moments."""
    mean, size = _take_in(tensors, t, config)
    torch._foreach_add_(size, config.epsilon)
    torch._foreach_div_(mean, size)
    return mean


def adam_atan2(tensors: Tensors, t: int, config: OptimizerConfig) -> list[Tensor]:
    """u of Adam-atan2; advances both moments."""
    mean, size = _take_in(tensors, t, config)
    return [torch.atan2(m, s).mul_(ATAN2_FACTOR) for m, s in zip(mean, size, strict=True)]


def ademamix(tensors: Tensors, t: int, config: OptimizerConfig) -> list[Tensor]:
    """u of AdEMAMix; advances its three moments."""
    mean, size = _take_in(tensors, t, config)
    slow = [state["exp_avg_slow"] for state in tensors.states]
    torch._foreach_lerp_(slow, list(tensors.gradients), 1 - slow_beta(t, config))
    torch._foreach_add_(mean, slow, alpha=slow_weight(t, config))
    torch._foreach_add_(size, config.epsilon)
    torch._foreach_div_(mean, size)
    return mean


def slow_weight(t: int, config: OptimizerConfig) -> float:
    """a at update t."""
    warmup = config.slow.warmup
    return config.slow.weight * (min(1.0, t / warmup) if warmup else 1.0)


def slow_beta(t: int, config: OptimizerConfig) -> float:
    """b3 at update t: 1 / log b moves linearly from b1's to b3's (the paper's section 3)."""
    warmup, beta1, beta3 = config.slow.warmup, config.beta1, config.slow.beta3
    if t >= warmup or beta1 == 0:
        return beta3
    first, last, done = math.log(beta1), math.log(beta3), t / warmup
    return min(math.exp(first * last / ((1 - done) * last + done * first)), beta3)


def lion(tensors: Tensors, t: int, config: OptimizerConfig) -> list[Tensor]:
    """u of Lion; advances its momentum."""
    gradients = list(tensors.gradients)
    momentum = [state["exp_avg"] for state in tensors.states]
    directions = list(torch._foreach_lerp(momentum, gradients, 1 - config.beta1))
    torch._foreach_sign_(directions)
    torch._foreach_lerp_(momentum, gradients, 1 - config.beta2)
    return directions


MOMENTS = ("exp_avg", "exp_avg_sq")
ADAMW = UpdateRule(names=MOMENTS, directions=adamw)
ADAM_ATAN2 = UpdateRule(names=MOMENTS, directions=adam_atan2)
ADEMAMIX = UpdateRule(names=(*MOMENTS, "exp_avg_slow"), directions=ademamix)
LION = UpdateRule(names=("exp_avg",), directions=lion)

"""Norms: LayerNorm, RMSNorm with several kinds of gain, and a function in place of a norm.

    layer         (x - mean) / sqrt(var + eps) g + b                              Ba et al., 1607.06450
    rms           x / sqrt(mean x^2 + eps) g                                      Zhang and Sennrich, 1910.07467
    rms-plain     the same without g                                              nanochat
    rms-single    the same with one g for all channels                            outlier-safe pre-training, 2506.19697
    rms-centred   the same with 1 + g, g from 0, so that weight decay draws the gain to 1    Qwen3-Next, Gemma
    dyt           g tanh(a x) + b, a from .5: no statistics at all                Zhu et al., 2503.10622

Statistics are in fp32 whatever the compute format. ``set_gain`` gives a norm another gain at the start, as the depth-scaled
sandwich needs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glm.errors import InputError
from glm.model.config import ModelConfig, NormKind
from glm.model.layers import Norm
from glm.precision import at_least_fp32, rms_norm


class RMSNorm(nn.Module):
    """x over its root mean square, times a gain.

    Args:
        width: of the last dimension.
        epsilon: eps.
        kind: "rms", "rms-plain", "rms-single" or "rms-centred".
    """

    def __init__(self, width: int, *, epsilon: float, kind: NormKind) -> None:
        super().__init__()
        self.epsilon, self.offset = epsilon, 1.0 if kind == "rms-centred" else 0.0
        size = {"rms-plain": 0, "rms-single": 1}.get(kind, width)
        self.weight = nn.Parameter(torch.empty(size)) if size else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A gain of 1."""
        self.set_gain(1.0)

    @torch.no_grad()
    def set_gain(self, gain: float) -> None:
        """The same gain for every channel. Raises InputError if there is none."""
        if self.weight is not None:
            self.weight.fill_(gain - self.offset)
        elif gain != 1.0:
            raise InputError("a norm without a gain cannot be scaled: choose model.norm_kind rms")

    def forward(self, x: Tensor) -> Tensor:
        gain = None if self.weight is None else at_least_fp32(self.weight)
        gain = gain + self.offset if gain is not None and self.offset else gain
        return rms_norm(at_least_fp32(x), gain, self.epsilon).to(x.dtype)


class DynamicTanh(nn.Module):
    """g tanh(a x) + b.

    Args:
        width: of the last dimension.
        bias: there is a b.
    """

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """a = .5, g = 1, b = 0."""
        self.slope.fill_(0.5)
        self.weight.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def set_gain(self, gain: float) -> None:
        """The same g for every channel."""
        self.weight.fill_(gain)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.slope * x) * self.weight
        return y if self.bias is None else y + self.bias


AnyNorm = Norm | RMSNorm | DynamicTanh
# These set their own initial values; a model draws its other tensors by name.
NORMS = (nn.LayerNorm, RMSNorm, DynamicTanh)


def make_norm(config: ModelConfig, width: int) -> AnyNorm:
    """A norm of the model's kind over ``width`` channels."""
    if config.norm_kind == "layer":
        return Norm(width, epsilon=config.norm_epsilon, bias=config.bias)
    if config.norm_kind == "dyt":
        return DynamicTanh(width, bias=config.bias)
    return RMSNorm(width, epsilon=config.norm_epsilon, kind=config.norm_kind)

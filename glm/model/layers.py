"""Linear layer and LayerNorm in the compute format, with fp32 accumulation inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm.precision import linear, with_recipe


class Linear(nn.Linear):
    """``nn.Linear`` whose half-precision product accumulates in fp32 on every machine (``glm.precision.matmul``).

    Attributes:
        product: function that multiplies x, weight and bias instead, as emulated formats do; None: torch does.
    """

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        product = self.product or linear
        return product(x, weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight)


class Norm(nn.LayerNorm):
    """LayerNorm. Computes mean and variance in fp32 whatever the compute format, as torch's kernels do."""

    def __init__(self, width: int, *, epsilon: float, bias: bool) -> None:
        super().__init__(width, eps=epsilon, bias=bias)

    @torch.no_grad()
    def set_gain(self, gain: float) -> None:
        """The same gain for every channel."""
        self.weight.fill_(gain)

    def forward(self, x: Tensor) -> Tensor:
        def norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

        return with_recipe(norm(x, self.weight, self.bias), norm, x, self.weight, self.bias)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def shrink_gradient(x: Tensor, alpha: float) -> Tensor:
    """EGS: x forward, alpha times the gradient backward.

    The derivative of ``x * alpha + x.detach() * (1 - alpha)`` (GLM-130B, section 2.3), without its rounding of x in fp16.
    """
    if alpha == 1.0:
        return x
    shrunk: Tensor = _ScaledGradient.apply(x, alpha)  # type: ignore[no-untyped-call]
    return shrunk

"""Sigma-reparametrization: a linear layer whose spectral norm is a parameter (Zhai et al., 2303.06296).

    W^ = g / sigma(W) W,     sigma(W) = u' W v,     g from 1

Power iteration finds u and v, the leading singular vectors: exact enough at the start, and one step further after every update
(``glm.model.weight_followers``), so that a forward pass changes nothing and a recomputed one is the same. They are buffers, which a
checkpoint keeps. The gradient goes through sigma with u and v held constant. Bounded spectral norms bound how low the entropy of
attention can fall.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm.model.layers import Linear
from glm.precision import at_least_fp32

FIRST_ITERATIONS = 30


class SpectralLinear(Linear):
    """A linear layer of spectral norm ``gain``."""

    left: Tensor
    right: Tensor

    def __init__(self, width: int, out: int, *, bias: bool) -> None:
        super().__init__(width, out, bias=bias)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("left", torch.zeros(out))
        self.register_buffer("right", torch.zeros(width))

    @torch.no_grad()
    def advance(self, iterations: int = 1) -> None:
        """Move u and v after the weight."""
        weight = at_least_fp32(self.weight)
        left = at_least_fp32(self.left)
        for _ in range(iterations):
            right = F.normalize(weight.t() @ left, dim=0)
            left = F.normalize(weight @ right, dim=0)
        self.left.copy_(left)
        self.right.copy_(right)

    @torch.no_grad()
    def begin(self) -> None:
        """u and v of freshly drawn weights, from a start that is the same everywhere."""
        self.gain.fill_(1.0)
        self.left.copy_(F.normalize(torch.cos(torch.arange(len(self.left), dtype=torch.float32)), dim=0))
        self.advance(FIRST_ITERATIONS)

    def forward(self, x: Tensor) -> Tensor:
        weight = at_least_fp32(self.weight)
        sigma = at_least_fp32(self.left) @ (weight @ at_least_fp32(self.right))
        scaled = weight * (at_least_fp32(self.gain) / sigma)
        return self.multiply(x, scaled.to(x.dtype))


def make_linear(width: int, out: int, *, bias: bool, spectral: bool) -> Linear:
    """A linear layer of a block."""
    return SpectralLinear(width, out, bias=bias) if spectral else Linear(width, out, bias=bias)

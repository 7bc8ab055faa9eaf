"""Feed-forward layers.

gelu, relu       W2 f(W1 x)
geglu, swiglu    W2 (a * f(b)),  [a, b] = W1 x         (Shazeer, 2002.05202; GLM-130B: GeGLU)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from glm.model.config import ModelConfig
from glm.model.layers import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "geglu": F.gelu,
    "swiglu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
}


class FeedForward(nn.Module):
    """The position-wise layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kind, inner = config.feed_forward.kind, config.feed_forward.width(config.hidden)
        self.is_gated = config.feed_forward.is_gated
        self.activation = ACTIVATIONS[kind]
        self.up = Linear(config.hidden, inner * (2 if self.is_gated else 1), bias=config.bias)
        self.down = Linear(inner, config.hidden, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        raised = self.up(x_BTC)
        if self.is_gated:
            a, b = raised.chunk(2, dim=-1)
            inner = a * self.activation(b)
        else:
            inner = self.activation(raised)
        lowered: Tensor = self.down(inner)
        return lowered

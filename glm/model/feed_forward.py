"""Feed-forward layers.

gelu, relu       W2 f(W1 x)
squared-relu     W2 relu(W1 x)^2                       (So et al., 2109.08668)
geglu, swiglu    W2 (a * f(b)),  [a, b] = W1 x         (Shazeer, 2002.05202; GLM-130B: GeGLU)

With ``clamp`` c: b <- min(b, c), a <- max(min(a, c), -c) before: outliers of the product are bounded by c f(c)   (gpt-oss)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from glm.model.config import ModelConfig
from glm.model.spectral import make_linear
from glm.precision import gated_gelu, has_kernel

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "geglu": F.gelu,
    "swiglu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "squared-relu": lambda x: F.relu(x).square(),
}


class FeedForward(nn.Module):
    """The position-wise layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kind, inner = config.feed_forward.kind, config.feed_forward.width(config.hidden)
        self.is_gated = config.feed_forward.is_gated
        self.activation = ACTIVATIONS[kind]
        self.has_gelu = self.activation is F.gelu
        self.clamp = config.feed_forward.clamp
        raised = inner * (2 if self.is_gated else 1)
        self.up = make_linear(config.hidden, raised, bias=config.bias, spectral=config.spectral)
        self.down = make_linear(inner, config.hidden, bias=config.bias, spectral=config.spectral)

    def forward(self, x_BTC: Tensor) -> Tensor:
        raised = self.up(x_BTC)
        if self.has_gelu and self.is_gated and not self.clamp and has_kernel(raised):
            inner = gated_gelu(raised)
        elif self.is_gated:
            a, b = raised.chunk(2, dim=-1)
            if self.clamp:
                a, b = a.clamp(-self.clamp, self.clamp), b.clamp(max=self.clamp)
            inner = a * self.activation(b)
        else:
            inner = self.activation(raised)
        lowered: Tensor = self.down(inner)
        return lowered

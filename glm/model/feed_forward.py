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

from glm.model.config import FeedForwardConfig, ModelConfig
from glm.model.spectral import make_linear
from glm.precision import gated_gelu, has_kernel

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "geglu": F.gelu,
    "swiglu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "squared-relu": lambda x: F.relu(x).square(),
}


class Activation:
    """The function between the two matrices of a feed-forward layer."""

    def __init__(self, config: FeedForwardConfig) -> None:
        self.is_gated = config.is_gated
        self.clamp = config.clamp
        self.function = ACTIVATIONS[config.kind]

    def __call__(self, raised: Tensor) -> Tensor:
        if not self.is_gated:
            return self.function(raised)
        if self.function is F.gelu and not self.clamp and has_kernel(raised, half=True):
            return gated_gelu(raised)
        a, b = raised.chunk(2, dim=-1)
        if self.clamp:
            a, b = a.clamp(-self.clamp, self.clamp), b.clamp(max=self.clamp)
        return a * self.function(b)


class FeedForward(nn.Module):
    """The position-wise layer.

    Args:
        config: of the model.
        inner: width between the matrices; None: the configured one.
    """

    def __init__(self, config: ModelConfig, *, inner: int | None = None) -> None:
        super().__init__()
        inner = inner or config.feed_forward.width(config.hidden)
        self.is_gated = config.feed_forward.is_gated
        self.activation = Activation(config.feed_forward)
        raised = inner * (2 if self.is_gated else 1)
        self.up = make_linear(config.hidden, raised, bias=config.bias, spectral=config.spectral)
        self.down = make_linear(inner, config.hidden, bias=config.bias, spectral=config.spectral)

    def forward(self, x_BTC: Tensor) -> Tensor:
        lowered: Tensor = self.down(self.activation(self.up(x_BTC)))
        return lowered

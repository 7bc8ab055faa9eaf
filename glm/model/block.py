"""One transformer layer, and the places of its norms.

x is the residual stream (GLM-130B calls it the main branch), A attention, F feed-forward, N norms:

    pre        x = x + A(N1 x);          x = x + F(N2 x)
    post       x = N1(x + A(x));         x = N2(x + F(x))
    sandwich   x = x + N3(A(N1 x));      x = x + N4(F(N2 x))                             (CogView, 2105.13290)
    deepnorm   a = N1 x; x = alpha a + A(a);  b = N2 x; x = alpha b + F(b)              (GLM-130B, alpha = (2 L)^1/2)
    deepnet    the same with alpha = (2 L)^1/4                                           (DeepNet, 2203.00555)
    parallel   x = x + A(N1 x) + F(N1 x)                                                 (PaLM)
    reordered  x = x + N1(A(x));         x = x + N2(F(x))                                (OLMo 2, 2501.00656)
    pre-scaled       pre, with N1 x and N2 x divided by sqrt(layer), from 1              (LayerNorm scaling, 2502.05795)
    sandwich-scaled  sandwich, with N3's and N4's gains 1 / sqrt(L) at first             (depth-scaled, 2504.07866, 2602.17004)

DeepNorm is post-LN: N(alpha x + A(x)) with each norm written at the beginning of what follows it, so layer 0's first norm acts on
the embedding and a final norm closes the stack. The stream stays bounded: |x| <= alpha |N x| + |A|.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glm.model.attention import Attention
from glm.model.cache import LayerCache
from glm.model.config import ModelConfig
from glm.model.dropout import attention_place, dropout, feed_forward_place
from glm.model.experts import Experts
from glm.model.feed_forward import FeedForward
from glm.model.norms import AnyNorm, make_norm
from glm.model.positions import Rotation
from glm.model.scaling import branch_scale


def residual_scale(config: ModelConfig) -> float:
    """alpha, the weight of the residual stream."""
    exponent = {"deepnorm": 0.5, "deepnet": 0.25}.get(config.norm, 0.0)
    return float((2 * config.layers) ** exponent)


class Block(nn.Module):
    """One layer; its output is the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm = "deepnorm" if config.norm == "deepnet" else config.norm
        self.is_parallel = config.parallel_block
        self.alpha = residual_scale(config)
        self.p = config.dropout
        self.attention_place, self.feed_forward_place = attention_place(layer), feed_forward_place(layer)

        self.input_scale = (layer + 1) ** -0.5 if config.norm == "pre-scaled" else 1.0
        self.branch_scale = branch_scale(config)

        def norm() -> AnyNorm:
            return make_norm(config, config.hidden)

        has_output_norms = config.norm in ("sandwich", "sandwich-scaled")
        self.attention_norm = norm()
        self.attention = Attention(config, layer)
        self.feed_forward_norm = None if self.is_parallel else norm()
        self.feed_forward = Experts(config) if config.feed_forward.experts.count else FeedForward(config)
        self.attention_output_norm = norm() if has_output_norms else None
        self.feed_forward_output_norm = norm() if has_output_norms else None

    def forward(
        self,
        x_BTC: Tensor,
        bias_BHTS: Tensor | None,
        turned: Rotation | None = None,
        cache: LayerCache | None = None,
        keys_B: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after this layer.

        Args:
            x_BTC, bias_BHTS, turned, cache: ``Attention.forward``'s.
            keys_B: of the rows' dropout masks; None: no dropout.
        """

        def attend(y: Tensor) -> Tensor:
            y = y * self.input_scale if self.input_scale != 1.0 else y
            out = dropout(self.attention(y, bias_BHTS, turned, cache), self.p, keys_B, self.attention_place)
            return out * self.branch_scale if self.branch_scale != 1.0 else out

        def feed(y: Tensor) -> Tensor:
            y = y * self.input_scale if self.input_scale != 1.0 else y
            out = dropout(self.feed_forward(y), self.p, keys_B, self.feed_forward_place)
            return out * self.branch_scale if self.branch_scale != 1.0 else out

        n1, n2, n3, n4 = (
            self.attention_norm,
            self.feed_forward_norm,
            self.attention_output_norm,
            self.feed_forward_output_norm,
        )
        x: Tensor = x_BTC
        if n2 is None:
            y = n1(x)
            x = x + attend(y) + feed(y)
        elif self.norm == "post":
            x = n1(x + attend(x))
            x = n2(x + feed(x))
        elif self.norm == "reordered":
            x = x + n1(attend(x))
            x = x + n2(feed(x))
        elif self.norm == "deepnorm":
            a = n1(x)
            x = torch.add(attend(a), a, alpha=self.alpha)
            b = n2(x)
            x = torch.add(feed(b), b, alpha=self.alpha)
        elif n3 is not None and n4 is not None:
            x = x + n3(attend(n1(x)))
            x = x + n4(feed(n2(x)))
        else:
            x = x + attend(n1(x))
            x = x + feed(n2(x))
        return x

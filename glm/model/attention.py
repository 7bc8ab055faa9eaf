"""Attention, and the ways of keeping its scores in range.

S = q k' / sqrt(D) per head, plus a bias that is -inf where a query may not look, then P = softmax(S), output P v. At scale S
leaves fp16's range, so:

    fp32        q / (sqrt(D) (l + 1)) k' in the compute format, x (l + 1) and softmax in fp32: GLM-130B's "FP32 softmax with
                query-key layer scaling"; l is the layer's number, from 0
    compute     everything in the compute format: what overflows does
    pb-relax    softmax((S/a - max S/a) a): CogView (2105.13290, section 2.4). S/a is what the product rounds to; from there
                on it is fp32, whose softmax takes the maximum off by itself
    fused       scaled_dot_product_attention: S is never held; a purely causal batch goes without a mask

QK-norm (Henry et al., 2010.04245) norms each head's q and k; a soft cap bounds S by c tanh(S / c) (Gemma 2, 2408.00118).

Shapes: B rows, T tokens (queries), S tokens that can be seen (keys), H heads, D dimensions a head, C = H D hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glm.model.cache import LayerCache
from glm.model.config import ModelConfig
from glm.model.layers import Linear, Norm
from glm.model.positions import Rotation, rotate
from glm.precision import attention_scores, fused_attention, matmul, softmax_matmul


class Scores(nn.Module):
    """The scores as the softmax gets them, [B, H, T, S]: -inf where a query may not look.

    A module of its own so that instruments see them.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        kind = config.attention.softmax
        self.soft_cap = config.attention.soft_cap
        self.in_compute_format = kind == "compute"
        # What the product is divided by before it is rounded, and multiplied by after.
        self.divisor = {"fp32": layer + 1.0, "pb-relax": config.attention.relax}.get(kind, 1.0)
        self.query_scale = 1.0 / (math.sqrt(config.head) * self.divisor)

    def forward(self, q_BHTD: Tensor, k_BHSD: Tensor, bias_BHTS: Tensor) -> Tensor:
        if not (self.soft_cap or self.in_compute_format):
            return attention_scores(q_BHTD, k_BHSD, bias_BHTS, self.query_scale, self.divisor)
        divided_BHTS = matmul(
            q_BHTD * self.query_scale, k_BHSD.transpose(-1, -2), widen=not self.in_compute_format
        )
        if self.soft_cap:
            return torch.tanh(divided_BHTS * (self.divisor / self.soft_cap)) * self.soft_cap + bias_BHTS
        return torch.add(bias_BHTS, divided_BHTS, alpha=self.divisor)


class Attention(nn.Module):
    """Multi-head self-attention under a visibility mask."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.head = config.heads, config.head
        self.query_key_value = Linear(config.hidden, 3 * config.hidden, bias=config.bias)
        self.output = Linear(config.hidden, config.hidden, bias=config.bias)
        norms = config.attention.qk_norm
        self.query_norm = Norm(self.head, epsilon=config.norm_epsilon, bias=config.bias) if norms else None
        self.key_norm = Norm(self.head, epsilon=config.norm_epsilon, bias=config.bias) if norms else None
        self.scores = None if config.attention.softmax == "fused" else Scores(config, layer)

    def forward(
        self,
        x_BTC: Tensor,
        bias_BHTS: Tensor | None,
        turned: Rotation | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x_BTC: what is attended from.
            bias_BHTS: added to the scores; -inf where a query may not look. None: causal, which only fused attention knows.
            turned: rotation of the queries and of their own keys; None: none.
            cache: keys and values of the tokens before, which these are added to; None: there are none before.
        """
        B, T, _ = x_BTC.shape
        qkv = self.query_key_value(x_BTC).view(B, T, 3, self.heads, self.head)
        q_BHTD, k_BHSD, v_BHSD = (part.transpose(1, 2) for part in qkv.unbind(2))
        if self.query_norm is not None and self.key_norm is not None:
            q_BHTD, k_BHSD = self.query_norm(q_BHTD), self.key_norm(k_BHSD)
        if turned is not None:
            q_BHTD, k_BHSD = rotate(q_BHTD, turned), rotate(k_BHSD, turned)
        if cache is not None:
            k_BHSD, v_BHSD = cache.extend(k_BHSD, v_BHSD)
        if self.scores is None:
            mixed_BHTD = fused_attention(q_BHTD, k_BHSD, v_BHSD, bias_BHTS)
        else:
            assert bias_BHTS is not None
            mixed_BHTD = softmax_matmul(self.scores(q_BHTD, k_BHSD, bias_BHTS), v_BHSD)
        attended: Tensor = self.output(mixed_BHTD.transpose(1, 2).flatten(2))
        return attended

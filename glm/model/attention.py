"""Attention, and the ways of keeping its scores in range.

S = q k' / sqrt(D) per head, masked, then P = softmax(S), output P v. At scale S leaves fp16's range, so:

    fp32        q / (sqrt(D) (l + 1)) k' in the compute format, x (l + 1) and softmax in fp32: GLM-130B's "FP32 softmax with
                query-key layer scaling"; l is the layer's number, from 0
    compute     everything in the compute format: what overflows does
    pb-relax    softmax((S/a - max S/a) a): CogView (2105.13290, section 2.4)
    fused       scaled_dot_product_attention: S is never held

QK-norm (Henry et al., 2010.04245) norms each head's q and k; a soft cap bounds S by c tanh(S / c) (Gemma 2, 2408.00118).

Shapes: B rows, T tokens, H heads, D dimensions a head, C = H D hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm.model.config import ModelConfig
from glm.model.layers import Linear, Norm
from glm.model.positions import Rotation, rotate
from glm.precision import matmul


class Scores(nn.Module):
    """The masked scores, [B, H, T, T]: -inf where a query may not look. A module of its own so that instruments see them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.softmax = config.attention.softmax
        self.soft_cap = config.attention.soft_cap
        self.relax = config.attention.relax
        self.scaling = float(layer + 1) if self.softmax == "fp32" else 1.0
        self.root = math.sqrt(config.head)

    def forward(
        self, q_BHTD: Tensor, k_BHTD: Tensor, visible_B1TT: Tensor, bias_BHTT: Tensor | None
    ) -> Tensor:
        divisor = self.scaling * (self.relax if self.softmax == "pb-relax" else 1.0)
        scores_BHTT = matmul(q_BHTD * (1.0 / (self.root * divisor)), k_BHTD.transpose(-1, -2))
        if self.softmax != "compute":
            scores_BHTT = scores_BHTT.float()
        if self.softmax == "pb-relax":
            return self._relaxed(scores_BHTT, visible_B1TT, bias_BHTT)
        if divisor != 1.0:
            scores_BHTT = scores_BHTT * divisor
        if self.soft_cap:
            scores_BHTT = self.soft_cap * torch.tanh(scores_BHTT / self.soft_cap)
        if bias_BHTT is not None:
            scores_BHTT = scores_BHTT + bias_BHTT.to(scores_BHTT.dtype)
        return scores_BHTT.masked_fill(~visible_B1TT, -math.inf)

    def _relaxed(self, divided_BHTT: Tensor, visible_B1TT: Tensor, bias_BHTT: Tensor | None) -> Tensor:
        # Softmax is unchanged by the subtracted maximum, which keeps every number that is scaled up again at or below 0.
        if bias_BHTT is not None:
            divided_BHTT = divided_BHTT + bias_BHTT / self.relax
        divided_BHTT = divided_BHTT.masked_fill(~visible_B1TT, -math.inf)
        return (divided_BHTT - divided_BHTT.detach().amax(-1, keepdim=True)) * self.relax


class Attention(nn.Module):
    """Multi-head self-attention under a visibility mask."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.head = config.heads, config.head
        self.is_fused = config.attention.softmax == "fused"
        self.rotates = config.attention.positions in ("rope", "rope2d")
        self.rotates_two = config.attention.positions == "rope2d"
        self.query_key_value = Linear(config.hidden, 3 * config.hidden, bias=config.bias)
        self.output = Linear(config.hidden, config.hidden, bias=config.bias)
        norms = config.attention.qk_norm
        self.query_norm = Norm(self.head, epsilon=config.norm_epsilon, bias=config.bias) if norms else None
        self.key_norm = Norm(self.head, epsilon=config.norm_epsilon, bias=config.bias) if norms else None
        self.scores = None if self.is_fused else Scores(config, layer)

    def forward(
        self,
        x_BTC: Tensor,
        visible_B1TT: Tensor,
        turned: Rotation | None = None,
        bias_BHTT: Tensor | None = None,
    ) -> Tensor:
        B, T, C = x_BTC.shape
        qkv = self.query_key_value(x_BTC).view(B, T, 3, self.heads, self.head)
        q_BHTD, k_BHTD, v_BHTD = (part.transpose(1, 2) for part in qkv.unbind(2))
        if self.query_norm is not None and self.key_norm is not None:
            q_BHTD, k_BHTD = self.query_norm(q_BHTD), self.key_norm(k_BHTD)
        if turned is not None:
            q_BHTD, k_BHTD = (rotate(x, turned, two=self.rotates_two) for x in (q_BHTD, k_BHTD))
        if self.scores is None:
            mask = visible_B1TT
            if bias_BHTT is not None:
                mask = bias_BHTT.to(q_BHTD.dtype).masked_fill(~visible_B1TT, -math.inf)
            mixed_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=mask)
        else:
            scores_BHTT = self.scores(q_BHTD, k_BHTD, visible_B1TT, bias_BHTT)
            mixed_BHTD = matmul(scores_BHTT.softmax(-1).to(v_BHTD.dtype), v_BHTD)
        attended: Tensor = self.output(mixed_BHTD.transpose(1, 2).reshape(B, T, C))
        return attended

"""Attention, and the ways of keeping its scores in range.

S = q k' / sqrt(D) per head, plus a bias that is -inf where a query may not look, then P = softmax(S), output P v. At scale S leaves
fp16's range, so:

    fp32        q / (sqrt(D) (l + 1)) k' in the compute format, x (l + 1) and softmax in fp32: GLM-130B's "FP32 softmax with
                query-key layer scaling"; l is the layer's number, from 0
    compute     everything in the compute format: scores may overflow
    pb-relax    softmax((S/a - max S/a) a): CogView (2105.13290, section 2.4). The product rounds to S/a; from there on
                it is fp32, whose softmax subtracts the maximum by itself
    fused       scaled_dot_product_attention: never holds S; a purely causal batch needs no mask

QK-norm (Henry et al., 2010.04245) norms each head's q and k, with ``v_norm`` v as well (2410.16682); a soft cap bounds S by c
tanh(S / c) (Gemma 2, 2408.00118); ``clip_qkv`` cuts q, k and v off (MPT, OLMo). For QK-clip (Kimi K2, 2507.20534) this module keeps
each head's largest score, and ``glm.train.qk_clip`` acts on it. Two levers change the heads' output:

    gate       o <- o sigmoid(G x), G of one number a head, or one an element      (Qiu et al., 2505.06708)
    sink       P over S and one logit s beside it that has no value: o <- o sigmoid(logsumexp S - s); s = 0 ("off by one"), or
               learned for each head                                                (gpt-oss; Xiao et al., 2309.17453)

Keys and values may have fewer heads, each shared by H / G queries (grouped queries, 2305.13245).

Shapes: B rows, T tokens (queries), S visible tokens (keys), H heads, G heads of keys, D dimensions a head, C = H D hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glm.model.cache import LayerCache
from glm.model.config import ModelConfig
from glm.model.layers import Linear
from glm.model.norms import make_norm
from glm.model.positions import Rotation, rotate
from glm.model.spectral import make_linear
from glm.precision import (
    at_least_fp32,
    attention_scores,
    fused_attention,
    gated_heads,
    has_kernel,
    matmul,
    softmax_matmul,
)
from glm.precision import attention as kernel_attention


class Scores(nn.Module):
    """The scores as the softmax gets them, [B, H, T, S]: -inf where a query may not look.

    A module of its own, so that instruments see the scores.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        kind = config.attention.softmax
        self.soft_cap = config.attention.soft_cap
        self.in_compute_format = kind == "compute"
        # Divides the product before rounding, and multiplies it after.
        self.divisor = {"fp32": layer + 1.0, "pb-relax": config.attention.relax}.get(kind, 1.0)
        self.query_scale = 1.0 / (math.sqrt(config.head) * self.divisor)

    @property
    def is_watched(self) -> bool:
        """Whether this module has a hook."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def has_kernel(self, x: Tensor, bias_BHTS: Tensor | None) -> bool:
        """Whether one kernel computes attention by these scores for tensors like ``x``."""
        plain = not (self.soft_cap or self.in_compute_format)
        return plain and bias_BHTS is not None and not bias_BHTS.requires_grad and has_kernel(x, half=True)

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
        own, C, bias = config.attention, config.hidden, config.bias
        self.heads, self.key_heads, self.head = config.heads, config.key_heads, config.head
        width = (self.heads + 2 * self.key_heads) * self.head
        self.query_key_value = make_linear(C, width, bias=bias, spectral=config.spectral)
        self.output = make_linear(C, C, bias=bias, spectral=config.spectral)
        self.query_norm = make_norm(config, self.head) if own.qk_norm else None
        self.key_norm = make_norm(config, self.head) if own.qk_norm else None
        self.value_norm = make_norm(config, self.head) if own.v_norm else None
        self.scores = None if own.softmax == "fused" else Scores(config, layer)
        self.limit = own.clip_qkv
        gates = {"none": 0, "head": self.heads, "element": C}[own.gate]
        self.gate = Linear(C, gates, bias=bias) if gates else None
        self.has_sink = own.sink != "none"
        self.sink_H = nn.Parameter(torch.zeros(self.heads)) if own.sink == "learned" else None
        # For QK-clip: the largest score of each head since QK-clip last read it.
        self.keeps_largest = own.qk_clip > 0
        self.largest_H: Tensor | None = None

    def forward(
        self,
        x_BTC: Tensor,
        bias_BHTS: Tensor | None,
        turned: Rotation | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x_BTC: the input.
            bias_BHTS: added to the scores; -inf where a query may not look. None: causal, which only fused attention knows.
            turned: rotation of the queries and of their own keys; None: none.
            cache: keys and values of earlier tokens, to which it adds these; None: there are none.
        """
        B, T, _ = x_BTC.shape
        qkv = self.query_key_value(x_BTC)
        if self.limit:
            qkv = qkv.clamp(-self.limit, self.limit)
        qkv = qkv.view(B, T, -1, self.head)
        if self.scores is not None and cache is None and self._has_kernel(qkv, bias_BHTS):
            assert bias_BHTS is not None
            mixed_BTC = self._through_kernel(qkv.view(B, T, 3, self.heads, self.head), bias_BHTS, turned)
        else:
            mixed_BTC = self._by_heads(qkv, bias_BHTS, turned, cache)
        if self.gate is not None:
            mixed_BTC = self._gated(mixed_BTC, x_BTC)
        attended: Tensor = self.output(mixed_BTC)
        return attended

    def _by_heads(
        self, qkv: Tensor, bias_BHTS: Tensor | None, turned: Rotation | None, cache: LayerCache | None
    ) -> Tensor:
        """The heads' output, [B, T, C], from queries, keys and values [B, T, H + 2 G, D]."""
        q_BHTD, k_BHSD, v_BHSD = (
            part.transpose(1, 2)
            for part in torch.split(qkv, [self.heads, self.key_heads, self.key_heads], dim=2)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q_BHTD, k_BHSD = self.query_norm(q_BHTD), self.key_norm(k_BHSD)
        if self.value_norm is not None:
            v_BHSD = self.value_norm(v_BHSD)
        if turned is not None:
            q_BHTD, k_BHSD = rotate(q_BHTD, turned), rotate(k_BHSD, turned)
        if cache is not None:
            k_BHSD, v_BHSD = cache.extend(k_BHSD, v_BHSD)
        if self.key_heads != self.heads:
            shared = self.heads // self.key_heads
            k_BHSD, v_BHSD = (x.repeat_interleave(shared, dim=1) for x in (k_BHSD, v_BHSD))
        if self.scores is None:
            mixed_BHTD = fused_attention(q_BHTD, k_BHSD, v_BHSD, bias_BHTS)
        else:
            assert bias_BHTS is not None
            scores_BHTS = self.scores(q_BHTD, k_BHSD, bias_BHTS)
            if self.keeps_largest and self.training and torch.is_grad_enabled():
                self._keep_largest(scores_BHTS.detach().amax((0, 2, 3)))
            mixed_BHTD = softmax_matmul(scores_BHTS, v_BHSD)
            if self.has_sink:
                mixed_BHTD = self._without_sink(mixed_BHTD, scores_BHTS)
        return mixed_BHTD.transpose(1, 2).flatten(2)

    def _through_kernel(self, qkv_BT3HD: Tensor, bias_BHTS: Tensor, turned: Rotation | None) -> Tensor:
        """The same by the compiled kernel, which holds the scores of a few queries at a time."""
        assert self.scores is not None
        if self.query_norm is not None and self.key_norm is not None:
            q, k, v = qkv_BT3HD.unbind(2)
            qkv_BT3HD = torch.stack((self.query_norm(q), self.key_norm(k), v), dim=2)
        if self.scores.is_watched:
            # Formed for the hooks, beside the computation: a watched run computes what an unwatched one does.
            q_BHTD, k_BHSD = (part.detach().transpose(1, 2) for part in qkv_BT3HD.unbind(2)[:2])
            if turned is not None:
                q_BHTD, k_BHSD = rotate(q_BHTD, turned), rotate(k_BHSD, turned)
            self.scores(q_BHTD, k_BHSD, bias_BHTS)
        largest_BH = None
        if self.keeps_largest and self.training and torch.is_grad_enabled():
            largest_BH = qkv_BT3HD.new_empty(len(qkv_BT3HD), self.heads, dtype=torch.float32)
        mixed_BTC: Tensor = kernel_attention(
            qkv_BT3HD, turned, bias_BHTS, self.scores.query_scale, self.scores.divisor, largest_BH
        )
        if largest_BH is not None:
            self._keep_largest(largest_BH.amax(0))
        return mixed_BTC

    def _has_kernel(self, qkv: Tensor, bias_BHTS: Tensor | None) -> bool:
        """Whether the compiled kernel computes this: not where something needs the scores afterwards."""
        if self.has_sink or self.value_norm is not None or self.key_heads != self.heads:
            return False
        return self.scores is not None and self.scores.has_kernel(qkv, bias_BHTS)

    def _keep_largest(self, largest_H: Tensor) -> None:
        self.largest_H = largest_H if self.largest_H is None else torch.maximum(self.largest_H, largest_H)

    def _without_sink(self, mixed_BHTD: Tensor, scores_BHTS: Tensor) -> Tensor:
        """The heads' output after the sink has taken its part of each query's attention."""
        total_BHT1 = at_least_fp32(scores_BHTS).logsumexp(-1, keepdim=True)
        if self.sink_H is not None:
            total_BHT1 = total_BHT1 - at_least_fp32(self.sink_H)[:, None, None]
        return (mixed_BHTD * torch.sigmoid(total_BHT1)).to(mixed_BHTD.dtype)

    def _gated(self, mixed_BTC: Tensor, x_BTC: Tensor) -> Tensor:
        assert self.gate is not None
        gate = self.gate(x_BTC)
        if gate.shape[-1] != self.heads:
            return mixed_BTC * torch.sigmoid(gate)
        return gated_heads(gate, mixed_BTC)

"""Where a token is, and which tokens it may see: rotary embeddings (1-D, 2-D), ALiBi, and the mask.

RoPE (Su et al., 2104.09864, equation 34), rotate-half form over all D dimensions of a head:

    x' = x cos(p w) + rotate_half(x) sin(p w),   w_i = base^(-2i/D),   rotate_half([a, b]) = [-b, a]

2-D RoPE turns the first half of the dimensions by the position in the text, the second by the place in the span (GLM's
two-dimensional positions). ALiBi (Press et al., 2108.12409) adds -m_h |i - j| to the scores, m_h = 2^(-8 h / H). The mask adds to
the scores too, as 0 or -inf: one addition serves both.

Shapes: B rows, T positions (queries), S visible positions (keys; S = T without a cache), H heads, D dimensions a head, G groups of
dimensions that turn together (1, or 2 in 2-D), R = D / 2G turned pairs of a group.

Limits: angles are in fp32, to 2^-24 p w relative; at position 2047 that is 1e-4 radian, less than the rounding of a half-precision
cosine.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]


def rotation(positions: Tensor, head: int, base: float, dtype: torch.dtype, *, two: bool) -> Rotation:
    """cos and sin of the angles, [B, 1, T, G, R] each, computed in fp32 (or wider) and rounded once.

    Args:
        positions: [B, T], or [B, T, 2] for the 2-D form.
        head: D.
        base: of the frequencies.
        dtype: of the queries and keys to turn.
        two: the 2-D form; positions [B, T] then are outside any span.
    """
    place_BTG = positions[..., None] if positions.dim() == 2 else positions
    if two and place_BTG.shape[-1] == 1:
        place_BTG = torch.cat((place_BTG, torch.zeros_like(place_BTG)), dim=-1)
    place_BTG = place_BTG[..., : 2 if two else 1]
    wide = torch.promote_types(dtype, torch.float32)
    dimensions = head // place_BTG.shape[-1]
    exponent_R = torch.arange(0, dimensions, 2, device=positions.device, dtype=wide) / dimensions
    angle_BTGR = place_BTG[..., None].to(wide) * base**-exponent_R
    return angle_BTGR.cos().to(dtype)[:, None], angle_BTGR.sin().to(dtype)[:, None]


class _Rotate(torch.autograd.Function):
    """The rotation is orthogonal, so its gradient is the rotation back; four multiplications either way, nothing kept."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x_BHTD, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x_BHTD: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    groups, pairs = cos.shape[-2:]
    a, b = x_BHTD.view(*x_BHTD.shape[:-1], groups, 2, pairs).unbind(-2)
    turned_a = (a * cos).addcmul_(b, sin, value=-direction)
    turned_b = (b * cos).addcmul_(a, sin, value=direction)
    return torch.stack((turned_a, turned_b), dim=-2).flatten(-3)


def rotate(x_BHTD: Tensor, turned: Rotation) -> Tensor:
    """Turn queries or keys by their positions."""
    result: Tensor = _Rotate.apply(x_BHTD, *turned)  # type: ignore[no-untyped-call]
    return result


def visible(segments_BT: Tensor, context_BT: Tensor) -> Tensor:
    """Which token may see which, [B, 1, T (query), T (key)] bool: same segment, and before the query or in the context."""
    T = segments_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return (same_BTT & (causal_TT | context_BT[:, None, :]))[:, None]


def is_causal(segments_BT: Tensor, context_BT: Tensor) -> bool:
    """Whether each row is one piece without context, so that the mask is the causal one. Waits for the device."""
    return bool(((segments_BT == segments_BT[:, :1]) & ~context_BT).all())


def alibi(query_BT: Tensor, key_BS: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """ALiBi's bias of the scores, [B, H, T, S], from the positions of queries and keys."""
    exponent_H = torch.arange(1, heads + 1, device=query_BT.device, dtype=dtype) * (8.0 / heads)
    distance_BTS = (query_BT[:, :, None] - key_BS[:, None, :]).abs().to(dtype)
    return -(2.0**-exponent_H)[:, None, None] * distance_BTS[:, None]


def score_bias(visible_B1TS: Tensor, alibi_BHTS: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The bias of the scores, [B, 1 or H, T, S]: ALiBi's or 0, and -inf where the query may not look."""
    if alibi_BHTS is None:
        bias_B1TS = torch.zeros(visible_B1TS.shape, dtype=dtype, device=visible_B1TS.device)
        return bias_B1TS.masked_fill_(~visible_B1TS, -math.inf)
    return alibi_BHTS.to(dtype).masked_fill(~visible_B1TS, -math.inf)

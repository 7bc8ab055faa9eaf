"""Where a token stands: rotary embeddings (1-D, 2-D) and ALiBi.

RoPE (Su et al., 2104.09864, equation 34), rotate-half form over all D dimensions of a head:

    x' = x cos(p w) + rotate_half(x) sin(p w),   w_i = base^(-2i/D),   rotate_half([a, b]) = [-b, a]

2-D RoPE turns the first half of the dimensions by the position in the text, the second by the place in the span (GLM's
two-dimensional positions). ALiBi (Press et al., 2108.12409) adds -m_h |i - j| to the scores, m_h = 2^(-8 h / H).

Shapes: B rows, T positions, H heads, D dimensions a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]


def rotation(positions: Tensor, head: int, base: float, dtype: torch.dtype, *, two: bool) -> Rotation:
    """cos and sin, [B, 1, T, D], computed in fp32 and rounded once.

    Args:
        positions: [B, T], or [B, T, 2] for the 2-D form.
    """
    if two:
        place = (
            positions
            if positions.dim() == 3
            else torch.stack((positions, torch.zeros_like(positions)), dim=-1)
        )
        parts = [_angles(place[..., i], head // 2, base) for i in (0, 1)]
        angle_BTD = torch.cat(parts, dim=-1)
    else:
        angle_BTD = _angles(positions if positions.dim() == 2 else positions[..., 0], head, base)
    return angle_BTD.cos().to(dtype)[:, None], angle_BTD.sin().to(dtype)[:, None]


def _angles(positions_BT: Tensor, dimensions: int, base: float) -> Tensor:
    frequency = base ** (
        -torch.arange(0, dimensions, 2, device=positions_BT.device, dtype=torch.float32) / dimensions
    )
    half = positions_BT[..., None].float() * frequency
    return torch.cat((half, half), dim=-1)


def rotate(x_BHTD: Tensor, turned: Rotation, *, two: bool) -> Tensor:
    """Turn queries or keys by their positions."""
    cos, sin = turned
    if two:
        a, b = x_BHTD.chunk(2, dim=-1)
        swapped = torch.cat((_rotate_half(a), _rotate_half(b)), dim=-1)
    else:
        swapped = _rotate_half(x_BHTD)
    return x_BHTD * cos + swapped * sin


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def alibi_bias(positions_BT: Tensor, heads: int) -> Tensor:
    """What ALiBi adds to the scores, [B, H, T, T] fp32."""
    slope_H = 2.0 ** (
        -8.0 * torch.arange(1, heads + 1, device=positions_BT.device, dtype=torch.float32) / heads
    )
    distance_BTT = (positions_BT[:, :, None] - positions_BT[:, None, :]).abs().float()
    return -slope_H[:, None, None] * distance_BTT[:, None]


def visible(segments_BT: Tensor, context_BT: Tensor) -> Tensor:
    """Who may see whom, [B, 1, T (query), T (key)] bool: same segment, and before the query or in the context."""
    T = segments_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return (same_BTT & (causal_TT | context_BT[:, None, :]))[:, None]

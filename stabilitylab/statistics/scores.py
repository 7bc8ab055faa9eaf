"""Ranges of attention scores per head, from materialised scores or from a fused kernel's results.

Shapes: B batch, H heads, T queries, S keys, D head dimension, K key heads (grouped-query attention: K divides H), R sampled rows. A
score is q.k * scale plus the mask's term; masked entries are -inf or the lowest numbers of the format, and do not count.

A fused kernel never forms the scores but returns L, the log-sum-exp of each row. With n keys in row i, and by Cauchy-Schwarz where
the mask adds nothing to q.k,

    row maximum m_i <= L_i <= m_i + log n          m_i <= C_i = |scale| |q_i| max_j |k_j|

so U_i = min(L_i, C_i) bounds it: L where scores are large, C where they are near 0 and L is log n. Let t be the row of the largest
U, with exact maximum m_t, and U' the second largest U. Then the largest score M obeys

    m_t <= M <= max(m_t, U')

The right side is ``score_max``: it never understates M, is exact whenever the two sides agree (they do when scores are large and
rows peaked, which is when it matters), and else exceeds M by at most log S.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.statistics import native

SAMPLED_ROWS = 4
DEPTH = 1000.0  # a score further below its row's largest is masked
ROUNDING = 1e-5  # of a length in float32, and of a score


@dataclass(frozen=True, slots=True)
class ScoreRanges:
    """The ranges of one attention call's scores, each [H].

    ``largest`` bounds the maximum from above and ``sampled`` from below (equal where exact); ``smallest`` is the minimum, of the
    sampled rows only under a fused kernel; ``entropy`` the mean entropy in nats of the sampled rows' weights.
    """

    largest: Tensor
    sampled: Tensor
    smallest: Tensor
    entropy: Tensor


def masked_below(dtype: torch.dtype) -> float:
    """Scores at or below this are masked: half the lowest number of the format, or a usual constant of hand-made masks."""
    return max(torch.finfo(dtype).min / 2, -1e8)


def entropy(scores: Tensor) -> Tensor:
    """Entropy in nats of softmax over the last dimension, float32; 0 for a wholly masked row."""
    scores = scores.float()
    scores = torch.where(scores > masked_below(torch.float32), scores, -math.inf)
    p = torch.nan_to_num(torch.softmax(scores, -1))
    weighted: Tensor = torch.special.xlogy(p, p)
    return weighted.sum(-1).neg()


def sample_rows(rows: int, device: torch.device) -> Tensor:
    """Up to ``SAMPLED_ROWS`` row numbers at equal distances, including the last row."""
    count = min(SAMPLED_ROWS, rows)
    return (torch.arange(1, count + 1, device=device) * rows) // count - 1


def materialised(scores_BHTS: Tensor) -> ScoreRanges:
    """Exact range of materialised scores."""
    largest_H, smallest_H = _range(scores_BHTS)
    rows = sample_rows(scores_BHTS.shape[2], scores_BHTS.device)
    entropy_H = entropy(scores_BHTS[0][:, rows]).mean(-1)
    return ScoreRanges(largest_H, largest_H, smallest_H, entropy_H)


def _range(scores_BHTS: Tensor) -> tuple[Tensor, Tensor]:
    cutoff = masked_below(scores_BHTS.dtype)
    library, dtype = native.kernel(), native.DTYPES.get(scores_BHTS.dtype)
    if library is not None and dtype is not None and scores_BHTS.device.type == "cpu":
        scores_BHTS = scores_BHTS.contiguous()
        B, H, T, S = scores_BHTS.shape
        largest_H = torch.full((H,), -math.inf, dtype=torch.float64)
        negated_H = torch.full((H,), -math.inf, dtype=torch.float64)
        addresses = largest_H.data_ptr(), negated_H.data_ptr()
        library.stabilitylab_scores(scores_BHTS.data_ptr(), dtype, B, H, T, S, cutoff, *addresses)
        smallest_H: Tensor = -negated_H
        return largest_H, smallest_H
    seen = scores_BHTS > cutoff
    largest_H = torch.where(seen | scores_BHTS.isnan(), scores_BHTS, -math.inf).amax((0, 2, 3)).float()
    smallest_H = _smallest(scores_BHTS, seen).amin((0, 2, 3)).float()
    return largest_H, smallest_H


def _smallest(scores: Tensor, seen: Tensor) -> Tensor:
    """The scores that count for the minimum, with infinity for the others."""
    deepest = torch.where(seen, scores, -math.inf).amax(-1, keepdim=True) - DEPTH
    return torch.where(seen & (scores > deepest), scores, math.inf)


def fused(
    lse_BHT: Tensor,
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> ScoreRanges:
    """Range of scores from the log-sum-exp of a fused kernel and a few rows recomputed.

    Args:
        lse_BHT: natural logarithm; rows beyond T are padding.
        q_BHTD: queries as given to the kernel.
        k_BKSD: keys as given to the kernel.
        mask: boolean (True: may look) or additive, broadcastable to [B, H, T, S].
        causal: query i sees keys j <= i.
        scale: factor on q.k; by default 1/sqrt(D).
    """
    scale = 1 / math.sqrt(q_BHTD.shape[-1]) if scale is None else scale
    if mask is not None:
        B, H, T, S = *q_BHTD.shape[:3], k_BKSD.shape[2]
        mask = mask.expand(B, H, T, S)
    ranges = _fused_in_kernel(lse_BHT, q_BHTD, k_BKSD, mask, causal, scale)
    if ranges is not None:
        return ranges
    # The caller may be under autocast, which would round the products to half.
    with torch.autocast(q_BHTD.device.type, enabled=False):
        return _fused_in_torch(lse_BHT, q_BHTD, k_BKSD, mask, causal, scale)


def _fused_in_kernel(
    lse_BHT: Tensor, q_BHTD: Tensor, k_BKSD: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> ScoreRanges | None:
    """The compiled kernel's result; None if it cannot take these tensors."""
    library, dtype = native.kernel(), native.DTYPES.get(q_BHTD.dtype)
    if (
        library is None
        or dtype is None
        or q_BHTD.device.type != "cpu"
        or lse_BHT.dtype != torch.float32
        or q_BHTD.stride(-1) != 1
        or k_BKSD.stride(-1) != 1
        or (mask is not None and mask.dtype not in (torch.bool, torch.float32))
    ):
        return None
    B, H, T, D = q_BHTD.shape
    out = torch.empty(4, H, dtype=torch.float64)
    job = native.AttentionJob(
        query=q_BHTD.data_ptr(),
        key=k_BKSD.data_ptr(),
        batch=B,
        heads=H,
        key_heads=k_BKSD.shape[1],
        queries=T,
        keys=k_BKSD.shape[2],
        width=D,
        query_stride=q_BHTD.stride()[:3],
        key_stride=k_BKSD.stride()[:3],
        lse=lse_BHT.data_ptr(),
        lse_stride=lse_BHT.stride(),
        dtype=dtype,
        causal=causal,
        rows=min(SAMPLED_ROWS, T),
        scale=scale,
        masked=masked_below(torch.float32),
        largest=out[0].data_ptr(),
        sampled=out[1].data_ptr(),
        negated_smallest=out[2].data_ptr(),
        entropy=out[3].data_ptr(),
    )
    if mask is not None:
        job.mask, job.mask_stride = mask.data_ptr(), mask.stride()
        job.mask_is_bool = mask.dtype == torch.bool
    if library.stabilitylab_attention(ctypes.addressof(job)):
        return None
    return ScoreRanges(out[0], out[1], out[2].neg(), out[3])


def _fused_in_torch(
    lse_BHT: Tensor, q_BHTD: Tensor, k_BKSD: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> ScoreRanges:
    """The same in torch operations, without host synchronisation."""
    B, H, T, _ = q_BHTD.shape
    S, device = k_BKSD.shape[2], q_BHTD.device
    lse_BHT = lse_BHT[:, :, :T].float()
    if mask is None or mask.dtype == torch.bool:
        wide = torch.promote_types(q_BHTD.dtype, torch.float32)
        longest_BK = torch.linalg.vector_norm(k_BKSD, dim=-1, dtype=wide).amax(-1)
        longest_BH = longest_BK.repeat_interleave(H // longest_BK.shape[1], dim=1)
        length_BHT = torch.linalg.vector_norm(q_BHTD, dim=-1, dtype=wide)
        reach_BHT = length_BHT * longest_BH[..., None] * (abs(scale) * (1 + ROUNDING))
        lse_BHT = lse_BHT.minimum(reach_BHT.float())
    if mask is not None:
        # Kernels differ in what they return for a row without keys.
        looks = mask if mask.dtype == torch.bool else mask > masked_below(mask.dtype)
        lse_BHT = torch.where(looks.any(-1), lse_BHT, -math.inf)
    flat_HN = lse_BHT.transpose(0, 1).reshape(H, B * T)
    top = flat_HN.topk(min(2, B * T), dim=1)
    b_H, t_H = top.indices[:, 0] // T, top.indices[:, 0] % T
    h_H = torch.arange(H, device=device)
    key_head_H = h_H * k_BKSD.shape[1] // H

    top_row_HS = _scores(q_BHTD[b_H, h_H, t_H][:, None], k_BKSD[b_H, key_head_H], scale)[:, 0]
    t_R = sample_rows(T, device)
    rows_HRS = _scores(q_BHTD[0][:, t_R], k_BKSD[0][key_head_H], scale)
    if mask is not None:
        top_row_HS = _masked(top_row_HS, mask[b_H, h_H, t_H])
        rows_HRS = _masked(rows_HRS, mask[0][:, t_R])
    if causal:
        keys_S = torch.arange(S, device=device)
        top_row_HS = torch.where(keys_S <= t_H[:, None], top_row_HS, -math.inf)
        rows_HRS = torch.where(keys_S <= t_R[:, None], rows_HRS, -math.inf)
    cutoff = masked_below(torch.float32)
    exact_H = top_row_HS.amax(-1)
    sampled_H = torch.maximum(exact_H, rows_HRS.amax((-1, -2)))
    bound_H = torch.maximum(exact_H, top.values[:, -1]) if B * T > 1 else exact_H
    seen_HRS = torch.cat([rows_HRS, top_row_HS[:, None]], dim=1)
    smallest_H = _smallest(seen_HRS, seen_HRS > cutoff).amin((-1, -2))
    return ScoreRanges(torch.maximum(bound_H, sampled_H), sampled_H, smallest_H, entropy(rows_HRS).mean(-1))


def _scores(q_HRD: Tensor, k_HSD: Tensor, scale: float) -> Tensor:
    return (q_HRD.float() @ k_HSD.float().transpose(-1, -2)) * scale


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.where(mask, scores, -math.inf)
    return scores + mask.float()

"""Ranges of attention scores against the full product in float64, by both implementations.

The kernel's log-sum-exp and our rows are float32: scores are compared to 1e-5 of their magnitude, entropies to 1e-5.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stabilitylab.statistics import native
from stabilitylab.statistics.scores import ScoreRanges, fused, materialised, sample_rows

B, H, T, S, D = 3, 4, 19, 23, 8


@pytest.fixture(params=["kernel", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "kernel", lambda: None)
    elif native.kernel() is None:
        pytest.skip("no C compiler")
    return request.param


def drawn(size: float, key_heads: int = H, queries: int = T) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(int(size * 10))
    q = torch.randn(B, queries, H, D, generator=g).transpose(1, 2) * size
    k, v = (torch.randn(B, S, key_heads, D, generator=g).transpose(1, 2) for _ in range(2))
    return q, k, v


def exact(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """All scores in float64, -inf where masked."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.double() @ k.double().transpose(-1, -2)) * (scale or 1 / math.sqrt(D))
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores


def row_masks() -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(5)
    boolean = torch.rand(B, 1, T, S, generator=g) < 0.7
    boolean[1, 0, 4] = False  # a row that sees nothing
    bias = torch.randn(H, T, S, generator=g)
    bias[..., 0] = -math.inf
    return {
        "none": None,
        "boolean": boolean,
        "bias": bias,
        "bias of a format's minimum": bias.clamp_min(-3.4e38),
    }


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("mask_name", ["none", "boolean", "bias", "bias of a format's minimum", "causal"])
@pytest.mark.parametrize("key_heads", [H, 2])
def test_fused_brackets_the_exact_maximum(
    implementation: str, size: float, mask_name: str, key_heads: int
) -> None:
    q, k, v = drawn(size, key_heads)
    causal = mask_name == "causal"
    mask = None if causal else row_masks()[mask_name]
    additive = torch.where(mask, 0.0, -math.inf) if mask is not None and mask.dtype == torch.bool else mask
    wide = [x.repeat_interleave(H // key_heads, dim=1) for x in (k, v)]
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, *wide, 0.0, causal, attn_mask=None if additive is None else additive.expand(B, H, T, S)
    )
    found = fused(lse, q, k, mask=mask, causal=causal)
    scores = exact(q, k, mask, causal, None)
    scores = torch.where(scores > -1e38, scores, -math.inf)
    largest = scores.amax((0, 2, 3))
    room = 1e-5 * scores[scores.isfinite()].abs().max()
    assert (found.sampled.double() <= largest + room).all()
    assert (found.largest.double() >= largest - room).all()
    assert (found.largest.double() <= largest + math.log(S) + room).all()
    if mask is None or mask.dtype == torch.bool:
        lengths = torch.linalg.vector_norm(q, dim=-1), torch.linalg.vector_norm(wide[0], dim=-1)
        reach = (lengths[0].amax(-1) * lengths[1].amax(-1) / math.sqrt(D)).amax(0)
        assert (found.largest.double() <= reach + room).all()  # near 0 much less than log S
    if size == 30.0:  # peaked rows: the bound is exact
        assert torch.allclose(found.largest.double(), largest, rtol=1e-4)
    rows = scores[0][:, sample_rows(T, q.device)]
    p = torch.softmax(rows, -1).nan_to_num()
    assert torch.allclose(found.entropy.double(), -torch.special.xlogy(p, p).sum(-1).mean(-1), atol=1e-5)
    assert (
        found.smallest.double() >= torch.where(scores.isfinite(), scores, math.inf).amin((0, 2, 3)) - room
    ).all()


def test_both_implementations_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.kernel() is None:
        pytest.skip("no C compiler")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (x.to(dtype) for x in drawn(3.0))
        _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False)
        one = fused(lse, q, k, scale=0.5)
        with monkeypatch.context() as patch:
            patch.setattr(native, "kernel", lambda: None)
            other = fused(lse, q, k, scale=0.5)
        for name in ScoreRanges.__dataclass_fields__:
            assert torch.allclose(getattr(one, name).float(), getattr(other, name).float(), rtol=1e-5), (
                dtype,
                name,
            )


def test_a_nan_query_shows(implementation: str) -> None:
    q, k, v = (x.clone() for x in drawn(1.0))
    q[1, 2, 3] = math.nan
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False)
    lse[1, 2, 3] = math.nan  # whatever this version of the kernel makes of it
    largest = fused(lse, q, k).largest
    assert largest[2].isnan()
    assert largest[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [-math.inf, "minimum"])
def test_materialised_scores_are_exact(implementation: str, dtype: torch.dtype, masked: float | str) -> None:
    scores = torch.randn(B, H, T, S, generator=torch.Generator().manual_seed(1)).mul(20).to(dtype)
    hidden = torch.ones(T, S, dtype=torch.bool).tril(3).logical_not()
    fill = torch.finfo(dtype).min if masked == "minimum" else masked
    found = materialised(scores.masked_fill(hidden, fill))
    seen = scores[:, :, ~hidden].float()
    assert torch.equal(found.largest.float(), seen.amax((0, 2)))
    assert torch.equal(found.smallest.float(), seen.amin((0, 2)))
    assert torch.equal(found.largest, found.sampled)
    rows = scores[0].masked_fill(hidden, -math.inf)[:, sample_rows(T, scores.device)].double()
    p = torch.softmax(rows, -1)
    # Scores of half precision enter as they are; the softmax is float32.
    assert torch.allclose(found.entropy.double(), -torch.special.xlogy(p, p).sum(-1).mean(-1), atol=1e-5)


def test_a_nan_score_shows(implementation: str) -> None:
    scores = torch.zeros(2, 3, 4, 4)
    scores[1, 1, 2, 2] = math.nan
    found = materialised(scores)
    assert found.largest[1].isnan()
    assert found.largest[0] == found.largest[2] == 0

"""Fused attention without a mask, where the mask is causal."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from glm.model.config import AttentionConfig
from tests.glm.model.test_transformer import EXACT, SMALL, model_of, rows


@pytest.mark.parametrize("context", [False, True])
def test_a_causal_batch_needs_no_mask(context, monkeypatch):
    """Fused attention gets the flag "causal" where each row is one piece without context, and only there."""
    tokens, place, _, _ = rows()
    given = (tokens, place, torch.zeros(2, 24, dtype=torch.int32), torch.zeros(2, 24, dtype=torch.bool))
    given[3][1, :5] = context
    masks = []
    attend = F.scaled_dot_product_attention

    def watched(*args, attn_mask, is_causal):
        masks.append(attn_mask)
        assert is_causal == (attn_mask is None)
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    fused = model_of(attention=AttentionConfig(softmax="fused")).hidden(*given)
    assert len(masks) == SMALL.layers
    assert all((mask is None) != context for mask in masks)
    torch.testing.assert_close(fused, model_of().hidden(*given), **EXACT)

"""A weight is a function of (seed, its name): arms share whatever has the same shape."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from glm.model.config import AttentionConfig, EmbeddingConfig, FeedForwardConfig, ModelConfig
from glm.model.initialise import generator_of
from glm.model.transformer import Transformer

CONFIG = ModelConfig(vocabulary=61, layers=3, hidden=24, heads=2, length=8)

ARMS = {
    "untied": {"embedding": EmbeddingConfig(tied=False)},
    "gelu": {"feed_forward": FeedForwardConfig(kind="gelu")},
    "learned": {"attention": AttentionConfig(positions="learned")},
    "qk-norm": {"attention": AttentionConfig(qk_norm=True)},
    "norm": {"embedding": EmbeddingConfig(norm=True)},
    "sandwich": {"norm": "sandwich"},
}


def weights(seed: int = 0, **levers: object) -> dict[str, torch.Tensor]:
    return {
        n: p.detach() for n, p in Transformer(dataclasses.replace(CONFIG, **levers), seed).named_parameters()
    }


@pytest.mark.parametrize("arm", ARMS)
def test_arms_share_what_has_equal_shapes(arm):
    # The same residual gains on both sides: what is compared is the draw.
    norm = "pre" if arm == "sandwich" else CONFIG.norm
    plain, other = weights(norm=norm), weights(**ARMS[arm])
    shared = [name for name in plain if name in other and plain[name].shape == other[name].shape]
    differ = (
        {name for name in plain if ".feed_forward." in name and "norm" not in name}
        if arm == "gelu"
        else set()
    )
    assert set(plain) - set(shared) <= differ
    for name in shared:
        assert torch.equal(plain[name], other[name]), name


def test_deeper_models_begin_with_the_shallower_ones_layers():
    shallow, deep = weights(norm="pre", layers=2), weights(norm="pre", layers=5)
    for name, weight in shallow.items():
        assert torch.equal(weight, deep[name]), name


def test_a_gain_scales_the_same_draw():
    plain, deep = weights(norm="pre"), weights(norm="deepnorm")
    name = "layers.1.feed_forward.down.weight"
    torch.testing.assert_close(deep[name], plain[name] * (2 * CONFIG.layers) ** -0.5)


def test_every_tensor_and_every_seed_has_numbers_of_its_own():
    drawn = [torch.randn(4, generator=generator_of(s, n)).tolist() for s in (0, 1) for n in ("a", "b", "a.b")]
    assert len({tuple(numbers) for numbers in drawn}) == 6
    assert not torch.equal(weights(0)["embedding.weight"], weights(1)["embedding.weight"])


def test_without_a_seed_weights_follow_torchs_generator():
    torch.manual_seed(7)
    first, second = Transformer(CONFIG), Transformer(CONFIG)
    torch.manual_seed(7)
    again = Transformer(CONFIG)
    assert torch.equal(first.embedding.weight, again.embedding.weight)
    assert not torch.equal(first.embedding.weight, second.embedding.weight)

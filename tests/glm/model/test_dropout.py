"""Dropout's masks: functions of the row and the place, with the right statistics, in every split, recomputed and compiled."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from scipy import stats

from glm.model.config import AttentionConfig, ModelConfig
from glm.model.dropout import attention_place, dropout, dropout_mask, feed_forward_place, row_keys
from glm.model.transformer import Transformer

P = 0.1
# Two-sided: one false alarm in a million.
ALPHA = 1e-6


def kept(mask):
    return (mask != 0).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_share_that_is_kept_is_binomial_and_the_rest_is_scaled(dtype):
    x = torch.ones(4, 64, 64, dtype=dtype)
    mask = dropout_mask(x, row_keys(0, 0, range(4)), 1, P)
    low, high = stats.binom.ppf([ALPHA / 2, 1 - ALPHA / 2], mask.numel(), 1 - P)
    assert low <= float(kept(mask).sum()) <= high
    assert set(mask.unique().tolist()) == {0.0, float(torch.tensor(1.0, dtype=dtype) / (1 - P))}


def test_masks_of_other_rows_places_updates_and_seeds_are_independent():
    x = torch.ones(2, 100, 100)
    masks = [
        kept(dropout_mask(x, row_keys(seed, update, range(2)), place, 0.5))[row].flatten()
        for seed, update, place, row in itertools.product((0, 1), (0, 1), (0, 1, 2), (0, 1))
    ]
    # Of independent masks, correlations are normal with deviation 1 / sqrt(n).
    pairs = list(itertools.combinations(masks, 2))
    bound = stats.norm.isf(ALPHA / 2 / len(pairs)) / math.sqrt(masks[0].numel())
    found = torch.stack([((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()) for a, b in pairs])
    assert float(found.abs().max()) < bound


def test_no_two_places_of_a_model_are_one():
    places = [place(layer) for layer in range(70) for place in (attention_place, feed_forward_place)]
    assert sorted(places) == list(range(1, 141))


def test_a_rows_mask_does_not_depend_on_the_rows_beside_it():
    x, keys_B = torch.ones(6, 5, 7), row_keys(3, 8, range(6))
    whole = dropout_mask(x, keys_B, 2, P)
    parts = [dropout_mask(x[i : i + 2], row_keys(3, 8, range(i, i + 2)), 2, P) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))


def test_nothing_is_drawn_from_torchs_own_generator():
    before = torch.get_rng_state()
    dropout(torch.ones(2, 3), P, row_keys(0, 0, range(2)), 0)
    assert torch.equal(before, torch.get_rng_state())


def test_the_gradient_is_dropped_with_the_value():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    keys_B = row_keys(0, 0, range(3))
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.5, keys_B, 1), x)


def model(**more):
    torch.manual_seed(0)
    made = Transformer(
        ModelConfig(vocabulary=50, layers=2, hidden=16, heads=2, length=12, dropout=0.3, **more)
    )
    return made.train()


def inputs(rows=4):
    g = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(50, (rows, 12), generator=g)
    positions_BT = torch.arange(12).expand(rows, -1)
    segments_BT = torch.zeros(rows, 12, dtype=torch.int32)
    return (
        tokens_BT,
        tokens_BT.roll(-1, 1),
        positions_BT,
        segments_BT,
        torch.zeros(rows, 12, dtype=torch.bool),
    )


def trained(made, keys_B):
    made.zero_grad()
    loss, _ = made.loss(*inputs(), keys_B=keys_B)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in made.parameters())]


@pytest.mark.parametrize("softmax", ["fp32", "fused"])
def test_recomputed_activations_are_dropped_alike(softmax):
    keys_B, attention = row_keys(0, 5, range(4)), AttentionConfig(softmax=softmax)
    kept_ones = trained(model(attention=attention), keys_B)
    again = trained(model(attention=attention, recompute=True), keys_B)
    assert all(torch.equal(a, b) for a, b in zip(kept_ones, again, strict=True))


def test_without_keys_torchs_generator_decides():
    made = model()
    torch.manual_seed(1)
    first = made.loss(*inputs())[0]
    torch.manual_seed(1)
    again = made.loss(*inputs())[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, made.loss(*inputs())[0])


def test_evaluation_drops_nothing():
    made = model().eval()
    dry = Transformer(dataclasses.replace(made.config, dropout=0.0))
    dry.load_state_dict(made.state_dict())
    assert torch.equal(made.loss(*inputs(), keys_B=row_keys(0, 0, range(4)))[0], dry.loss(*inputs())[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_layer_drops_the_same_and_is_compiled_once():
    eager = [trained(model(), row_keys(0, update, range(4))) for update in range(3)]
    made = model()
    for layer in made.layers:
        layer.compile(fullgraph=True, backend="aot_eager")  # no code is generated: that takes minutes
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for update in range(3):
        found = trained(made, row_keys(0, update, range(4)))
        for a, b in zip(eager[update], found, strict=True):
            # fp32 sums of at most 48 terms in another order.
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= len(made.layers)

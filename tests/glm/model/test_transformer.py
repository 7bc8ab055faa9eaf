"""The model against naive twins in float64: blocks, positions, masks, loss, levers, initial weights."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from glm.errors import InputError
from glm.model.attention import Scores
from glm.model.block import Block, residual_scale
from glm.model.config import AttentionConfig, EmbeddingConfig, FeedForwardConfig, ModelConfig
from glm.model.initialise import deep_gain
from glm.model.positions import alibi, rotate, rotation, score_bias, visible
from glm.model.transformer import Transformer
from glm.model.vocabulary_loss import vocabulary_loss, vocabulary_losses
from glm.presets import PRESETS

SMALL = ModelConfig(vocabulary=97, layers=3, hidden=32, heads=4, length=24)
# float64 sums of a few hundred terms of order one: rounding of some 1e-14; anything else is a wrong formula.
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def model_of(**levers):
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(SMALL, **levers)).double()
    with torch.no_grad():  # norms and biases away from 1 and 0, so that a missing one shows
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def rows(seed=0, T=24, B=2):
    """Random rows of two pieces and some padding, each with a context."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 97, (B, T), generator=generator)
    segments = torch.zeros(B, T, dtype=torch.int32)
    segments[:, T // 2 :] = 1
    segments[:, T - 2 :] = -1
    context = torch.zeros(B, T, dtype=torch.bool)
    context[:, : T // 4] = True
    context[:, T // 2 : T // 2 + 3] = True
    positions = torch.arange(T).expand(B, T).clone()
    return tokens, positions, segments, context


def naive_visible(segments, context):
    B, T = segments.shape
    seen = torch.zeros(B, 1, T, T, dtype=torch.bool)
    for b in range(B):
        for i in range(T):
            for j in range(T):
                seen[b, 0, i, j] = bool(segments[b, i] == segments[b, j] and (j <= i or context[b, j]))
    return seen


def test_the_mask_is_the_definition():
    _, _, segments, context = rows()
    assert torch.equal(visible(segments, context), naive_visible(segments, context))


@pytest.mark.parametrize("softmax", ["fp32", "compute", "pb-relax", "fused"])
@pytest.mark.parametrize("positions", ["rope", "alibi", "learned"])
def test_what_a_position_may_not_see_leaves_its_logits_alone(softmax, positions):
    model = model_of(attention=AttentionConfig(softmax=softmax, positions=positions)).float()
    tokens, place, segments, context = rows()
    seen = naive_visible(segments, context)
    before = model(tokens, place, segments, context)
    # Block by block: a position sees what those see that it sees; under this mask that is the same set.
    for j in (0, 5, 8, 13, 20):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % 97
        after = model(changed, place, segments, context)
        for i in range(24):
            reaches = bool(seen[0, 0, i, j]) or (bool(context[0, i]) and bool(seen[0, 0, i, j]))
            if not reaches:
                assert torch.equal(before[:, i], after[:, i]), (i, j)
            elif i == j:
                assert not torch.equal(before[:, i], after[:, i])


def naive_attention(attention, x, seen, place):
    """Token by token, head by head."""
    B, T, C = x.shape
    H, D = attention.heads, attention.head
    w, b = attention.query_key_value.weight, attention.query_key_value.bias
    q, k, v = (
        (x @ part.T + bias).view(B, T, H, D) for part, bias in zip(w.chunk(3), b.chunk(3), strict=True)
    )
    mixed = torch.zeros(B, T, H, D, dtype=x.dtype)
    frequency = [10_000 ** (-2 * i / D) for i in range(D // 2)]

    def turn(vector, position):
        out = vector.clone()
        for i, f in enumerate(frequency):
            c, s = math.cos(float(position) * f), math.sin(float(position) * f)
            a, b_ = vector[i], vector[i + D // 2]
            out[i], out[i + D // 2] = a * c - b_ * s, b_ * c + a * s
        return out

    for bi in range(B):
        for h in range(H):
            qs = [turn(q[bi, t, h], place[bi, t]) for t in range(T)]
            ks = [turn(k[bi, t, h], place[bi, t]) for t in range(T)]
            for i in range(T):
                js = [j for j in range(T) if seen[bi, 0, i, j]]
                p = torch.softmax(torch.stack([qs[i] @ ks[j] / math.sqrt(D) for j in js]), 0)
                mixed[bi, i, h] = sum(weight * v[bi, j, h] for weight, j in zip(p, js, strict=True))
    return attention.output(mixed.reshape(B, T, C))


def test_attention_is_the_naive_one():
    _, place, segments, context = rows(T=12, B=1)
    model = model_of()
    block = model.layers[1]
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    turned = rotation(place, 8, 10_000.0, torch.float64, two=False)
    seen = visible(segments, context)
    ours = block.attention(x, score_bias(seen, None, torch.float64), turned)
    torch.testing.assert_close(ours, naive_attention(block.attention, x, seen, place), **EXACT)


@pytest.mark.parametrize("softmax", ["compute", "pb-relax", "fused"])
@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_ways_of_handling_scores_agree(softmax, positions):
    def hidden(kind):
        model = model_of(attention=AttentionConfig(softmax=kind, positions=positions))
        return model.hidden(*rows())

    torch.testing.assert_close(hidden(softmax), hidden("fp32"), **EXACT)


def test_soft_cap_and_layer_scaling():
    q, k = torch.randn(2, 1, 4, 6, 8, dtype=torch.float64).unbind(0)
    seen = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    bias = score_bias(seen, None, torch.float64)
    exact = (q @ k.transpose(-1, -2)) / math.sqrt(8)
    for layer in (0, 5):
        scores = Scores(SMALL, layer)(q, k, bias)
        torch.testing.assert_close(scores[seen.expand_as(scores)], exact[seen.expand_as(exact)], **EXACT)
        assert (scores[~seen.expand_as(scores)] == -math.inf).all()
    capped = Scores(dataclasses.replace(SMALL, attention=AttentionConfig(soft_cap=0.5)), 2)(q, k, bias)
    shown = seen.expand_as(capped)
    torch.testing.assert_close(capped[shown], (0.5 * torch.tanh(exact / 0.5))[shown], **EXACT)


def test_rotation_depends_on_differences_only():
    q, k = torch.randn(2, 1, 1, 2, 8, dtype=torch.float64).unbind(0)

    def score(a, b):
        place = torch.tensor([[a, b]])
        turned = rotation(place, 8, 10_000.0, torch.float64, two=False)
        x, y = rotate(q, turned), rotate(k, turned)
        return x[0, 0, 0] @ y[0, 0, 1]

    torch.testing.assert_close(score(3, 5), score(40, 42), **EXACT)
    two = rotation(torch.tensor([[[3, 1], [5, 2]]]), 8, 10_000.0, torch.float64, two=True)
    halves = [
        rotation(torch.tensor([[a, b]]), 4, 10_000.0, torch.float64, two=False) for a, b in ((3, 5), (1, 2))
    ]
    expected = torch.cat(
        [rotate(part, turned) for part, turned in zip(q.chunk(2, -1), halves, strict=True)], -1
    )
    torch.testing.assert_close(rotate(q, two), expected, **EXACT)


def test_alibi_slopes_are_the_papers():
    bias = alibi(torch.arange(5)[None], torch.arange(5)[None], 8, torch.float64)
    slopes = [2.0**-i for i in range(1, 9)]  # the paper's example for 8 heads
    for h, slope in enumerate(slopes):
        for i in range(5):
            for j in range(5):
                assert bias[0, h, i, j].item() == pytest.approx(-slope * abs(i - j))


def norm(x, module):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * module.weight + (0 if module.bias is None else module.bias)


@pytest.mark.parametrize("form", ["pre", "post", "sandwich", "deepnorm", "deepnet", "parallel"])
def test_blocks_are_their_equations(form):
    levers = {"norm": "pre", "parallel_block": True} if form == "parallel" else {"norm": form}
    block = model_of(**levers).layers[2]
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    bias = score_bias(visible(*rows()[2:]), None, torch.float64)

    def A(y):
        return block.attention(y, bias)

    f, n1, n2 = block.feed_forward, block.attention_norm, block.feed_forward_norm
    alpha = {"deepnorm": (2 * 3) ** 0.5, "deepnet": (2 * 3) ** 0.25}.get(form, 0)
    if form == "pre":
        h = x + A(norm(x, n1))
        expected = h + f(norm(h, n2))
    elif form == "post":
        h = norm(x + A(x), n1)
        expected = norm(h + f(h), n2)
    elif form == "sandwich":
        h = x + norm(A(norm(x, n1)), block.attention_output_norm)
        expected = h + norm(f(norm(h, n2)), block.feed_forward_output_norm)
    elif form == "parallel":
        expected = x + A(norm(x, n1)) + f(norm(x, n1))
    else:
        a = norm(x, n1)
        h = alpha * a + A(a)
        b = norm(h, n2)
        expected = alpha * b + f(b)
        assert residual_scale(dataclasses.replace(SMALL, norm=form)) == pytest.approx(alpha)
    torch.testing.assert_close(block(x, bias), expected, **EXACT)


@pytest.mark.parametrize("kind", ["geglu", "swiglu", "gelu", "relu"])
def test_feed_forwards_are_their_equations(kind):
    feed = model_of(feed_forward=FeedForwardConfig(kind=kind, inner=48)).layers[0].feed_forward
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    raised = x @ feed.up.weight.T + feed.up.bias
    cdf = 0.5 * (1 + torch.erf(raised / math.sqrt(2)))
    inner = {
        "geglu": lambda: raised[..., :48] * (raised * cdf)[..., 48:],
        "swiglu": lambda: raised[..., :48] * (raised * torch.sigmoid(raised))[..., 48:],
        "gelu": lambda: raised * cdf,
        "relu": lambda: raised.clamp(min=0),
    }[kind]()
    torch.testing.assert_close(feed(x), inner @ feed.down.weight.T + feed.down.bias, **EXACT)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_vocabulary_loss_is_cross_entropy(z_loss, monkeypatch):
    monkeypatch.setattr(
        "glm.model.vocabulary_loss.CHUNK_ELEMENTS", 97 * 7
    )  # several chunks, the last one short
    hidden = torch.randn(40, 32, requires_grad=True)
    weight = torch.randn(97, 32, requires_grad=True)
    target = torch.randint(0, 97, (40,))
    (3.0 * vocabulary_loss(hidden, weight, target, z_loss)).backward()
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = h @ w.T
    exact = F.cross_entropy(logits, target, reduction="sum") + z_loss * logits.logsumexp(1).square().sum()
    (3.0 * exact).backward()
    # fp32 sums over 97 classes and 40 rows of numbers up to about 20.
    loss, of_z = vocabulary_losses(hidden, weight, target, z_loss)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert of_z.item() == pytest.approx(z_loss * float(logits.detach().logsumexp(1).square().sum()), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-5, atol=1e-4)


def test_the_models_loss_counts_targets_only():
    model = model_of().float()
    tokens, place, segments, context = rows()
    targets = torch.randint(0, 97, tokens.shape)
    targets[:, ::3] = -100
    total, count = model.loss(tokens, targets, place, segments, context)
    logits = model(tokens, place, segments, context)
    exact = F.cross_entropy(
        logits.reshape(-1, 97).double(), targets.reshape(-1), ignore_index=-100, reduction="sum"
    )
    assert count == int((targets >= 0).sum())
    assert total.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_egs_scales_its_side_of_the_tied_gradient(side):
    def gradient(alpha, which):
        model = model_of(embedding=EmbeddingConfig(gradient_shrink=alpha, shrink_side=which)).float()
        tokens, place, segments, context = rows()
        total, _ = model.loss(tokens, tokens.roll(-1, 1), place, segments, context)
        total.backward()
        return total.item(), model.embedding.weight.grad

    loss, whole = gradient(1.0, side)
    _, without_input = gradient(0.0, "input")
    _, without_output = gradient(0.0, "output")
    torch.testing.assert_close(without_input + without_output, whole, rtol=1e-4, atol=1e-5)
    shrunk_loss, shrunk = gradient(0.1, side)
    from_input, from_output = whole - without_input, whole - without_output
    expected = {
        "input": 0.1 * from_input + from_output,
        "output": from_input + 0.1 * from_output,
        "both": 0.1 * whole,
    }[side]
    assert shrunk_loss == loss  # forward is untouched
    torch.testing.assert_close(shrunk, expected, rtol=1e-3, atol=1e-4)


def test_recomputation_gives_the_same_gradients():
    def gradients(recompute):
        model = model_of(recompute=recompute, dropout=0.2).float()
        torch.manual_seed(5)
        tokens, place, segments, context = rows()
        model.loss(tokens, tokens.roll(-1, 1), place, segments, context)[0].backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_have_as_many_parameters_as_the_formula_says(name):
    config = PRESETS[name].model
    config = dataclasses.replace(config, vocabulary=config.vocabulary or 4096)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameters()


def test_glm_130b_is_130b():
    h, inner, layers, vocabulary = 12288, 32768, 70, 150_528
    matrices = 4 * h * h + 3 * h * inner
    biases_and_norms = 3 * h + h + 2 * inner + h + 4 * h
    assert (
        PRESETS["glm-130b"].model.parameters()
        == layers * (matrices + biases_and_norms) + vocabulary * h + 2 * h
    )


@pytest.mark.parametrize(
    ("init", "form"),
    [("xavier", "deepnorm"), ("xavier", "deepnet"), ("xavier", "pre"), ("gpt2", "pre"), ("small", "pre")],
)
def test_initial_weights_have_the_schemes_deviations(init, form):
    config = ModelConfig(vocabulary=50, layers=4, hidden=256, heads=4, norm=form, init=init)
    torch.manual_seed(1)
    block = Block(config, 0)
    from glm.model.initialise import initialise_block

    initialise_block(block, config, 1, "layers.0")
    q, k, v = block.attention.query_key_value.weight.chunk(3)
    beta = {"deepnorm": (2 * 4) ** -0.5, "deepnet": (8 * 4) ** -0.25}.get(form, 1.0)
    assert deep_gain(config) == pytest.approx(beta)
    inner = block.feed_forward.down.weight.shape[1]
    plain = {"gpt2": 0.02, "small": math.sqrt(2 / (5 * 256))}.get(init)
    out = None if plain is None else plain / math.sqrt(8)
    square, wide = math.sqrt(1 / 256), math.sqrt(2 / (256 + inner))
    expected = [
        (q, plain or square),
        (k, plain or square),
        (v, plain or beta * square),
        (block.attention.output.weight, out or beta * square),
        (block.feed_forward.up.weight.chunk(2)[0], plain or beta * wide),
        (block.feed_forward.down.weight, out or beta * wide),
    ]
    for weight, deviation in expected:
        # A standard deviation from n values has relative error 1 / sqrt(2n); five of them.
        assert weight.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * weight.numel()))
    assert not block.attention.query_key_value.bias.any()


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].model.hidden == 128])
def test_small_presets_learn(name):
    config = dataclasses.replace(PRESETS[name].model, vocabulary=97, layers=2, hidden=32, heads=2, length=24)
    torch.manual_seed(0)
    model = Transformer(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    tokens, place, segments, context = rows()
    losses = []
    for _ in range(12):
        total, count = model.loss(tokens, tokens.roll(-1, 1), place, segments, context)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item() / count)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"heads": 5}, "must divide"),
        ({"layers": 0}, "must be positive"),
        ({"dropout": 1.0}, "dropout"),
        ({"parallel_block": True, "norm": "deepnorm"}, "parallel_block"),
        ({"hidden": 12, "heads": 4}, "multiple of 2"),
    ],
)
def test_impossible_shapes_are_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        dataclasses.replace(SMALL, **wrong)


def test_rows_longer_than_the_positions_are_refused():
    with pytest.raises(InputError, match="only 24 positions"):
        model_of().hidden(*(torch.zeros(1, 30, dtype=torch.int64),) * 3, torch.zeros(1, 30, dtype=torch.bool))
    with pytest.raises(InputError, match="vocabulary is not set"):
        Transformer(dataclasses.replace(SMALL, vocabulary=None))

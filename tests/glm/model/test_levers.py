"""The model's newer levers against their equations in float64, written out here."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from glm.distributed.config import ParallelConfig
from glm.errors import InputError
from glm.model.block import Block
from glm.model.config import (
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    ModelConfig,
    ScalingConfig,
)
from glm.model.feed_forward import FeedForward
from glm.model.norms import make_norm
from glm.model.positions import score_bias
from glm.model.spectral import SpectralLinear
from glm.model.transformer import Transformer
from glm.model.vocabulary_loss import vocabulary_loss
from glm.model.weight_followers import follow_all
from glm.parallel.topology import checked
from glm.precision import PrecisionPolicy
from glm.train.engine import rate_factors_of
from glm.train.optimizer import MixedPrecisionAdamW
from glm.train.qk_clip import clip_queries_and_keys
from glm.train.update_rules import OptimizerConfig

SMALL = ModelConfig(vocabulary=97, layers=3, hidden=32, heads=4, length=24)
EXACT = {"rtol": 1e-9, "atol": 1e-11}
T = 9


def shaken(module):
    """In float64, with weights away from 1 and 0, so that a missing one shows."""
    module = module.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def attention_of(**levers):
    config = dataclasses.replace(SMALL, attention=AttentionConfig(positions="none", **levers))
    torch.manual_seed(0)
    block = Block(config, 1)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return shaken(block).attention


def sample(width=32):
    return torch.randn(2, T, width, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def causal():
    return score_bias(torch.ones(T, T, dtype=torch.bool).tril()[None, None], None, torch.float64)


def naive(attention, x, *, key_heads=4, sink=None, gate=None, limit=math.inf, v_norm=False):
    """Head by head."""
    qkv = F.linear(x, attention.query_key_value.weight, attention.query_key_value.bias).clamp(-limit, limit)
    D, H = 8, 4
    queries, keys, values = qkv.split([H * D, key_heads * D, key_heads * D], dim=-1)
    heads = []
    for h in range(H):
        q = queries[..., h * D : (h + 1) * D]
        g = h * key_heads // H
        k, v = (part[..., g * D : (g + 1) * D] for part in (keys, values))
        if v_norm:
            q, k, v = (
                F.layer_norm(part, (D,), norm.weight, norm.bias)
                for part, norm in (
                    (q, attention.query_norm),
                    (k, attention.key_norm),
                    (v, attention.value_norm),
                )
            )
        scores = q @ k.mT / math.sqrt(D) + causal()[0]
        if sink is not None:
            scores = torch.cat((scores, sink[h].expand(2, T, 1)), dim=-1)
        heads.append(scores.softmax(-1)[..., :T] @ v)
    mixed = torch.cat(heads, dim=-1)
    if gate is not None:
        mixed = mixed * gate
    return F.linear(mixed, attention.output.weight, attention.output.bias)


def same_with_gradients(attention, expected, x):
    """Output, and the gradients of everything that the naive twin uses too."""
    parameters = [p for p in attention.parameters() if p.requires_grad]
    y = attention(x, causal())
    torch.testing.assert_close(y, expected, **EXACT)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    ours = torch.autograd.grad((y * weight).sum(), parameters)
    theirs = torch.autograd.grad((expected * weight).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    # In fp32 a compiled kernel may do the same: sums of 32 numbers of order one.
    single = copy.deepcopy(attention).float()(x.float(), causal().float())
    torch.testing.assert_close(
        single.double(), expected, rtol=0, atol=64 * 2.0**-24 * expected.detach().abs().max().item()
    )


@pytest.mark.parametrize("kind", ["off-by-one", "learned"])
def test_a_sink_is_one_more_logit(kind):
    attention = attention_of(sink=kind)
    sink = attention.sink_H if kind == "learned" else torch.zeros(4, dtype=torch.float64)
    x = sample()
    same_with_gradients(attention, naive(attention, x, sink=sink), x)


@pytest.mark.parametrize("kind", ["head", "element"])
def test_a_gate_is_a_sigmoid_of_the_input(kind):
    attention, x = attention_of(gate=kind), sample()
    gate = torch.sigmoid(x @ attention.gate.weight.T + attention.gate.bias)
    if kind == "head":
        gate = torch.stack([gate[..., h // 8] for h in range(32)], dim=-1)
    same_with_gradients(attention, naive(attention, x, gate=gate), x)


@pytest.mark.parametrize("softmax", ["fp32", "fused", "compute"])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries_share_keys(softmax, key_heads):
    attention, x = attention_of(key_heads=key_heads, softmax=softmax), sample()
    same_with_gradients(attention, naive(attention, x, key_heads=key_heads), x)


def test_clip_qkv_and_the_norm_of_all_three():
    x = sample()
    attention = attention_of(clip_qkv=0.4)
    same_with_gradients(attention, naive(attention, x, limit=0.4), x)
    attention = attention_of(qk_norm=True, v_norm=True)
    same_with_gradients(attention, naive(attention, x, v_norm=True), x)


@pytest.mark.parametrize("key_heads", [None, 2])
def test_qk_clip_brings_a_heads_largest_score_to_the_threshold(key_heads):
    attention = attention_of(qk_clip=1.0, key_heads=key_heads, softmax="compute")
    x = 3 * sample()
    shell = torch.nn.Module()
    shell.attention = attention
    attention(x, causal())
    before = attention.largest_H.clone()
    attention(0.1 * x, causal())  # a second micro-batch does not hide the first
    assert torch.equal(attention.largest_H, before)
    threshold = float(before.sort().values[1:3].mean())
    weights = dict(shell.named_parameters())
    values = weights["attention.query_key_value.weight"][-8:].clone()
    told = clip_queries_and_keys(shell, weights, threshold)
    assert attention.largest_H is None
    attention(x, causal())
    after = attention.largest_H
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-6, atol=0)
    assert torch.equal(weights["attention.query_key_value.weight"][-8:], values)
    assert told["qk_clip/-/clipped_heads"].item() == pytest.approx(0.5)
    assert told["qk_clip/-/score_max"].item() == pytest.approx(float(before.max()), rel=1e-6)
    attention.eval()
    attention.largest_H = None
    attention(x, causal())
    assert attention.largest_H is None


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_qk_clip_leaves_a_head_alone_whose_score_is_no_number(bad):
    """fp16's overflow must not become weights of zero."""
    shell = torch.nn.Module()
    shell.attention = attention_of(qk_clip=1.0, softmax="compute")
    weights = dict(shell.named_parameters())
    before = weights["attention.query_key_value.weight"].clone()
    shell.attention.largest_H = torch.full((shell.attention.heads,), bad)
    clip_queries_and_keys(shell, weights, 1.0)
    assert torch.equal(weights["attention.query_key_value.weight"], before)


def test_replicas_clip_by_the_largest_score_of_all():
    shell = torch.nn.Module()
    shell.attention = attention_of(qk_clip=1.0, softmax="compute")
    weights = dict(shell.named_parameters())
    before = weights["attention.query_key_value.weight"].clone()
    # This one has had no rows; the others' largest score was 4.
    told = clip_queries_and_keys(shell, weights, 1.0, across=lambda mine: mine.clamp_min(4.0))
    width = shell.attention.heads * shell.attention.head
    after = weights["attention.query_key_value.weight"]
    torch.testing.assert_close(after[: 2 * width], before[: 2 * width] / 2)
    assert torch.equal(after[2 * width :], before[2 * width :])
    assert told["qk_clip/-/score_max"] == 4


@pytest.mark.parametrize("kind", ["rms", "rms-plain", "rms-single", "rms-centred", "dyt"])
def test_norms_are_their_formulas(kind):
    norm = make_norm(dataclasses.replace(SMALL, norm_kind=kind), 32)
    x = sample()
    fresh = norm.double()(x)
    if kind == "dyt":
        torch.testing.assert_close(fresh, torch.tanh(0.5 * x))
    else:
        torch.testing.assert_close(fresh, F.rms_norm(x, (32,), eps=1e-5), **EXACT)
    norm = shaken(norm)
    if kind == "dyt":
        expected = norm.weight * torch.tanh(norm.slope * x) + norm.bias
    else:
        gain = {"rms-plain": 1.0, "rms-centred": 1 + norm.weight if norm.weight is not None else 0}.get(
            kind, norm.weight
        )
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
    torch.testing.assert_close(norm(x), expected, **EXACT)
    half = norm.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["reordered", "pre-scaled", "sandwich-scaled"])
def test_blocks_are_their_equations(form):
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(SMALL, norm=form))
    block = model.layers[1]
    if form == "sandwich-scaled":
        assert block.attention_output_norm.weight.unique().item() == pytest.approx(3**-0.5)
        assert block.attention_norm.weight.unique().item() == 1.0
    shaken(block)
    x = sample()

    def A(y):
        return block.attention(y, causal())

    F_, n1, n2 = block.feed_forward, block.attention_norm, block.feed_forward_norm
    if form == "reordered":
        h = x + n1(A(x))
        expected = h + n2(F_(h))
    elif form == "pre-scaled":
        h = x + A(n1(x) / math.sqrt(2))
        expected = h + F_(n2(h) / math.sqrt(2))
    else:
        h = x + block.attention_output_norm(A(n1(x)))
        expected = h + block.feed_forward_output_norm(F_(n2(h)))
    torch.testing.assert_close(block(x, causal()), expected, **EXACT)


def test_squared_relu_and_the_clamp():
    x = sample()
    config = dataclasses.replace(SMALL, feed_forward=FeedForwardConfig(kind="squared-relu"))
    feed = shaken(FeedForward(config))
    torch.testing.assert_close(feed(x), feed.down(feed.up(x).relu() ** 2), **EXACT)
    config = dataclasses.replace(SMALL, feed_forward=FeedForwardConfig(kind="swiglu", clamp=0.2))
    feed = shaken(FeedForward(config))
    a, b = feed.up(x).chunk(2, dim=-1)
    torch.testing.assert_close(feed(x), feed.down(a.clamp(-0.2, 0.2) * F.silu(b.clamp(max=0.2))), **EXACT)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_capped_logits(z_loss, monkeypatch):
    monkeypatch.setattr("glm.model.vocabulary_loss.CHUNK_ELEMENTS", 97 * 3)
    hidden = torch.randn(8, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(97, 32, dtype=torch.float64, requires_grad=True)
    target = torch.arange(8) * 11
    ours = vocabulary_loss(hidden, weight, target, z_loss, 5.0)
    z = 5 * torch.tanh(hidden @ weight.T / 5)
    exact = F.cross_entropy(z, target, reduction="sum") + z_loss * z.logsumexp(-1).square().sum()
    torch.testing.assert_close(ours, exact, **EXACT)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    model = Transformer(dataclasses.replace(SMALL, logit_cap=1e-3))
    row = torch.zeros(1, 4, dtype=torch.int64)
    logits = model(row, torch.arange(4)[None], row, row.bool())
    assert logits.abs().max() <= 1e-3


def test_sigma_reparametrization_has_the_spectral_norm_it_says():
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(SMALL, spectral=True))
    layers = [m for m in model.modules() if isinstance(m, SpectralLinear)]
    assert len(layers) == 12
    for layer in layers:
        used = layer(torch.eye(layer.weight.shape[1])).T - layer.bias[:, None]
        # Thirty steps of power iteration from a fixed start: gaps between singular values are a few percent.
        assert torch.linalg.matrix_norm(used.double(), 2).item() == pytest.approx(1.0, abs=0.03)
    layer = layers[0]
    with torch.no_grad():
        layer.weight.mul_(7)
        layer.gain.fill_(2.5)
    for _ in range(200):
        follow_all(model, applied=True)
    used = layer(torch.eye(32)).T - layer.bias[:, None]
    assert torch.linalg.matrix_norm(used.double(), 2).item() == pytest.approx(2.5, rel=1e-4)
    # The gradient is that of g W / (u' W v), u and v held.
    layer.double()
    x = sample()
    y = layer(x)
    (ours,) = torch.autograd.grad(y.square().sum(), layer.weight)
    w = layer.weight.detach().clone().requires_grad_()
    exact = F.linear(x, layer.gain * w / (layer.left @ w @ layer.right), layer.bias)
    (theirs,) = torch.autograd.grad(exact.square().sum(), w)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert {"layers.0.attention.output.left", "layers.0.attention.output.right"} <= model.state_dict().keys()


def test_scale_and_deviation_of_the_embedding():
    config = dataclasses.replace(SMALL, embedding=EmbeddingConfig(scale="sqrt", std=0.5))
    model = Transformer(config, seed=1)
    assert model.embedding.weight.std().item() == pytest.approx(0.5, rel=0.05)
    row = torch.arange(5)[None]
    torch.testing.assert_close(model.embed(row, row), model.embedding.weight[:5][None] * math.sqrt(32))
    fan_in = Transformer(dataclasses.replace(SMALL, init="fan-in", norm="pre"), seed=1)
    weight = fan_in.layers[0].feed_forward.up.weight
    assert weight.std().item() == pytest.approx(32**-0.5, rel=0.05)


def activations(kind, width, layers=2):
    """RMS of the change of the logits' inputs and of the residual stream after some AdamW updates."""
    scaling = ScalingConfig(kind=kind, base_hidden=32, base_layers=2)
    config = ModelConfig(
        vocabulary=31,
        layers=layers,
        hidden=width,
        heads=width // 8,
        length=16,
        norm="pre",
        init="gpt2",
        bias=False,
        embedding=EmbeddingConfig(tied=False),
        scaling=scaling,
    )
    model = Transformer(config, seed=3)
    optimizer = MixedPrecisionAdamW(
        model, OptimizerConfig(), PrecisionPolicy(), factors=rate_factors_of(model)
    )
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 31, (4, 16), generator=generator)
    place, zeros = torch.arange(16).expand(4, 16), torch.zeros(4, 16, dtype=torch.int64)
    seen = {}
    model.layers[-1].register_forward_hook(lambda m, i, o: seen.__setitem__("x", o.detach()))
    before = model(rows, place, zeros, zeros.bool()).detach(), seen["x"]
    for _ in range(4):
        loss, _ = model.loss(rows, rows.roll(-1, 1), place, zeros, zeros.bool())
        (loss / rows.numel()).backward()
        optimizer.accumulate()
        optimizer.gradients(1.0)
        optimizer.step_with(5e-3, clip=0.0)
        optimizer.zero_grad()
    after = model(rows, place, zeros, zeros.bool()).detach(), seen["x"]
    return [float((a - b).square().mean().sqrt()) for a, b in zip(after, before, strict=True)]


def test_coordinate_check():
    """Under muP what an update changes does not grow with the width; under standard scaling it does."""
    growth = {}
    for kind in ("standard", "mup"):
        narrow, wide = activations(kind, 32), activations(kind, 256)
        growth[kind] = [b / a for a, b in zip(narrow, wide, strict=True)]
    assert all(g > 2.0 for g in growth["standard"]), growth
    assert all(0.4 < g < 1.6 for g in growth["mup"]), growth
    # And with CompleteP not with the depth either.
    shallow, deep = activations("complete-p", 32), activations("complete-p", 32, layers=16)
    plain = activations("mup", 32, layers=16)
    assert deep[1] / shallow[1] < 1.6
    assert plain[1] / shallow[1] > 2.0


LEVERS = {
    "grouped": {"attention": AttentionConfig(key_heads=2)},
    "gated": {"attention": AttentionConfig(gate="head", sink="learned", v_norm=True, qk_norm=True)},
    "element": {"attention": AttentionConfig(gate="element"), "bias": False, "norm_kind": "rms-single"},
    **{kind: {"norm_kind": kind} for kind in ("rms", "rms-plain", "rms-centred", "dyt")},
    "spectral": {"spectral": True},
    "reordered": {"norm": "reordered"},
    "scaled": {"norm": "sandwich-scaled", "norm_kind": "rms"},
}


@pytest.mark.parametrize("name", LEVERS)
def test_the_formula_counts_every_parameter(name):
    from glm.planning.shape import shape_of

    config = dataclasses.replace(SMALL, **LEVERS[name])
    model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameters()
    if name != "spectral":
        assert shape_of(config).parameters == config.parameters()


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("needs the scores", lambda: AttentionConfig(qk_clip=100.0, softmax="fused")),
        ("needs the scores", lambda: AttentionConfig(sink="learned", softmax="fused")),
        ("choose one", lambda: AttentionConfig(qk_clip=100.0, qk_norm=True)),
        ("divide", lambda: dataclasses.replace(SMALL, attention=AttentionConfig(key_heads=3))),
        ("geglu and swiglu", lambda: FeedForwardConfig(kind="relu", clamp=7.0)),
        ("sets gains", lambda: dataclasses.replace(SMALL, norm="sandwich-scaled", norm_kind="rms-plain")),
        ("pre or reordered", lambda: dataclasses.replace(SMALL, scaling=ScalingConfig(kind="mup"))),
        ("one process", lambda: checked(ParallelConfig(data=2), dataclasses.replace(SMALL, spectral=True))),
        (
            "not cut over tensor ranks",
            lambda: checked(
                ParallelConfig(tensor=2),
                dataclasses.replace(SMALL, vocabulary=96, attention=AttentionConfig(key_heads=2)),
            ),
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(message, make):
    with pytest.raises(InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)

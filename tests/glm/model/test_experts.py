"""Experts against a token-by-token twin in float64; loads, penalties and the bias against their definitions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from glm.data.batch import Batch
from glm.distributed.config import ParallelConfig
from glm.errors import InputError
from glm.model.block import Block
from glm.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig
from glm.model.experts import Experts, expert_loads
from glm.model.transformer import Transformer
from glm.parallel.topology import checked
from glm.planning.shape import shape_of
from glm.train.config import BatchConfig, TrainConfig
from glm.train.engine import LocalEngine
from glm.train.update_rules import OptimizerConfig

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def config_of(*, kind="swiglu", layers=2, **experts):
    return ModelConfig(
        vocabulary=31,
        layers=layers,
        hidden=16,
        heads=2,
        length=16,
        feed_forward=FeedForwardConfig(kind=kind, inner=24, experts=ExpertsConfig(count=4, **experts)),
    )


def experts_of(**levers):
    torch.manual_seed(0)
    layer = Block(config_of(**levers), 0).feed_forward
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.double()


def by_token(layer, x, *, limit=math.inf, kind="swiglu"):
    """Output, router logits, choices and the number of dropped ones."""
    tokens = x.reshape(-1, x.shape[-1])
    logits = tokens @ layer.router.weight.T
    taken = [0] * layer.count
    rows, chosen, dropped = [], [], 0
    for token, row in zip(tokens, logits, strict=True):
        p = row.softmax(-1)
        order = sorted(
            range(layer.count),
            key=lambda e, p=p: -(p[e].item() + (0 if layer.bias_E is None else layer.bias_E[e].item())),
        )
        picks = order[: layer.active]
        chosen.append(picks)
        y = torch.zeros_like(token)
        for e in picks:
            if taken[e] >= limit:
                dropped += 1
                continue
            taken[e] += 1
            raised = layer.up[e] @ token
            if kind == "swiglu":
                a, b = raised.chunk(2)
                inner = a * F.silu(b)
            else:
                inner = raised.relu() ** 2
            y = y + p[e] / sum(p[i] for i in picks) * (layer.down[e] @ inner)
        if layer.shared is not None:
            y = y + layer.shared(token[None])[0]
        rows.append(y)
    return torch.stack(rows).view_as(x), logits, chosen, dropped


@pytest.mark.parametrize(
    "levers",
    [
        {"active": 2},
        {"active": 1, "kind": "squared-relu"},
        {"active": 3, "shared": 2},
        {"active": 2, "bias_rate": 0.01},
        {"active": 2, "capacity": 0.75},
    ],
    ids=str,
)
def test_a_token_passes_through_the_experts_it_chose(levers):
    layer = experts_of(**levers)
    if layer.bias_E is not None:
        layer.bias_E.copy_(torch.tensor([0.0, 0.3, -0.2, 0.0]))
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    limit = math.ceil(levers["capacity"] * 14 * 2 / 4) if "capacity" in levers else math.inf
    expected, _, chosen, dropped = by_token(layer, x, limit=limit, kind=levers.get("kind", "swiglu"))
    y = layer(x)
    torch.testing.assert_close(y, expected, **EXACT)
    load = [sum(e in picks for picks in chosen) for e in range(4)]
    assert layer.load_E.tolist() == load
    assert layer.dropped.item() == dropped
    assert (dropped > 0) == ("capacity" in levers)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    parameters = list(layer.parameters())
    ours = torch.autograd.grad((y * weight).sum(), parameters)
    theirs = torch.autograd.grad((expected * weight).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_penalties_are_their_formulas():
    layer = experts_of(active=2, balance=0.1, router_z=0.01)
    x = torch.randn(1, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer(x)
    _, logits, chosen, _ = by_token(layer, x)
    f = torch.tensor([sum(e in picks for picks in chosen) / 18 for e in range(4)], dtype=torch.float64)
    P = logits.softmax(-1).mean(0)
    expected = 0.1 * 4 * (f * P).sum() + 0.01 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(layer.penalty, expected, **EXACT)
    # An even router gives the least balance loss, its coefficient.
    with torch.no_grad():
        layer.router.weight.zero_()
    even = experts_of(active=4, balance=0.1)
    even(x)
    assert even.penalty.item() == pytest.approx(0.1, rel=1e-6)


def test_the_bias_moves_towards_an_even_load():
    layer = experts_of(active=1, bias_rate=0.02).float()
    # Tokens differ, and all have one thing in common that expert 0 is preferred for.
    with torch.no_grad():
        layer.router.weight.mul_(0.5)[0, 0] = 2.0
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(2))
    x[..., 0] = 1.0
    largest = []
    for _ in range(60):
        layer(x)
        largest.append(layer.load_E.max().item() / 16)
        before = layer.bias_E.clone()
        layer.follow(applied=False)
        assert torch.equal(layer.bias_E, before)
        layer(x)
        load = layer.load_E.float()
        layer.follow(applied=True)
        torch.testing.assert_close(layer.bias_E - before, 0.02 * torch.sign(load.mean() - load))
        assert layer.load_E is None
    assert largest[0] > 2.0
    assert max(largest[-5:]) < 1.5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_bias_moves_by_its_rate_in_every_precision(precision):
    """From 1/2 on bf16 rounds a thousandth off, and from 1/32 on a ten-thousandth."""
    config = TrainConfig(model=config_of(active=1, bias_rate=1e-4), precision=precision)
    layer = LocalEngine(config).model.layers[0].feed_forward
    for before in (0.04, 0.6):
        layer.bias_E.fill_(before)
        for _ in range(10):
            layer.load_E = torch.tensor([9, 1, 1, 1])
            layer.follow(applied=True)
        expected = before + 1e-3 * torch.tensor([-1.0, 1.0, 1.0, 1.0])
        torch.testing.assert_close(layer.bias_E, expected, rtol=0, atol=1e-6)


def test_loads_are_telemetry():
    layer = experts_of(active=1, balance=0.0)
    shell = torch.nn.Module()
    shell.feed = layer
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1.0
    layer(torch.ones(1, 8, 16, dtype=torch.float64))
    told = {name: value.item() for name, value in expert_loads(shell).items()}
    assert told == {
        "experts/feed/load_max": 4.0,
        "experts/feed/load_entropy": 0.0,
        "experts/feed/dead": 0.75,
        "experts/feed/dropped": 0.0,
    }
    layer.eval()
    layer.follow(applied=False)
    layer(torch.ones(1, 8, 16, dtype=torch.float64))
    assert expert_loads(shell) == {}


def batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 31, (2, 16), generator=generator)
    place = torch.arange(16).expand(2, 16).contiguous()
    return Batch(
        tokens_BT=tokens,
        targets_BT=tokens.roll(-1, 1),
        positions=place,
        segments_BT=torch.zeros(2, 16, dtype=torch.int64),
        context_BT=place < 4,
        provenance=(),
    )


def test_the_loss_has_the_penalty_per_target_and_recomputation_changes_nothing():
    gradients = {}
    for recompute in (False, True):
        config = dataclasses.replace(config_of(active=2, balance=0.5, router_z=0.1), recompute=recompute)
        model = Transformer(config, seed=1).double()
        one = batch(0)
        given = one.tokens_BT, one.targets_BT, one.positions, one.segments_BT, one.context_BT
        loss, count = model.loss(*given)
        loss.backward()
        gradients[recompute] = {name: p.grad for name, p in model.named_parameters()}
        penalty = sum(m.penalty for m in model.modules() if isinstance(m, Experts))
        model.eval()
        plain, _ = model.loss(*given)
        torch.testing.assert_close(loss, plain + count * penalty)
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradient, gradients[True][name], **EXACT)


@pytest.mark.parametrize("capacity", [0.0, 0.6])
def test_a_recomputed_layer_notes_once(capacity):
    """Loads, dropped choices and the penalty, and so biases, telemetry and weights, are those of an ordinary layer."""
    left, told = {}, {}
    for recompute in (False, True):
        model = dataclasses.replace(
            config_of(active=2, bias_rate=0.01, balance=0.5, capacity=capacity), recompute=recompute
        )
        engine = LocalEngine(TrainConfig(model=model, batch=BatchConfig(rows=2, micro_rows=1)))
        for step in range(3):
            engine.forward_backward(batch(step), step)
            layers = [m for m in engine.model.modules() if isinstance(m, Experts)]
            assert all(int(m.load_E.sum()) == 2 * 16 * 2 for m in layers)
            left[recompute, step] = [(m.load_E, m.dropped, m.penalty.detach()) for m in layers]
            engine.gradients()
            engine.update(0.05, clip=1.0)
            told[recompute, step] = {name: float(value) for name, value in engine.levers().items()}
        left[recompute, 3] = [tuple(engine.tensors()[0].values())]
    for step in range(4):
        for ours, theirs in zip(left[True, step], left[False, step], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert told.get((True, step)) == told.get((False, step))
    assert (told[True, 0]["experts/layers.0.feed_forward/dropped"] > 0) == (capacity > 0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_experts_train_and_go_on_to_the_bit(kind, precision):
    config = TrainConfig(
        model=config_of(active=2, shared=1, bias_rate=0.01, capacity=1.5),
        batch=BatchConfig(rows=2),
        optimizer=OptimizerConfig(kind=kind),
        precision=precision,
    )
    one = LocalEngine(config)

    def train(engine, steps):
        losses = []
        for step in steps:
            losses.append(engine.forward_backward(batch(step % 2), step))
            engine.gradients()
            engine.update(5e-3, clip=1.0)
        return losses

    losses = train(one, range(30))
    assert losses[-1] < losses[0] - 0.2
    assert one.levers()["experts/layers.0.feed_forward/load_entropy"] > 0.3
    weights, moments = ({n: t.detach().clone() for n, t in d.items()} for d in one.tensors())
    assert "layers.0.feed_forward.bias_E" in weights
    state = one.state_dict()
    two = LocalEngine(config)
    two.load_tensors(weights, moments)
    two.load_state_dict(state)
    train(one, range(30, 33))
    train(two, range(30, 33))
    for name, tensor in one.tensors()[0].items():
        assert torch.equal(tensor, two.tensors()[0][name]), name


@pytest.mark.parametrize("levers", [{"active": 2}, {"active": 1, "shared": 2}, {"kind": "relu"}], ids=str)
def test_the_formulas_count_experts(levers):
    config = config_of(**levers)
    model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameters()
    shape = shape_of(config)
    assert shape.parameters == config.parameters()
    idle = (4 - config.feed_forward.experts.active) * 16 * (shape.up + shape.inner)
    assert shape.used_matrices == shape.matrices - idle


def test_experts_are_drawn_as_dense_layers_are():
    model = Transformer(config_of(), seed=5)
    up = model.layers[0].feed_forward.up
    assert up[0].std().item() == pytest.approx(0.5 * math.sqrt(2 / (16 + 24)), rel=0.1)
    assert not torch.equal(up[0], up[1])


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("between 1 and the count", lambda: ExpertsConfig(count=2, active=3)),
        ("leave one of them out", lambda: dataclasses.replace(config_of(), spectral=True)),
        ("parallel.data alone", lambda: checked(ParallelConfig(pipeline=2), config_of())),
        ("parallel.data alone", lambda: checked(ParallelConfig(data=2, zero=2), config_of())),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(message, make):
    with pytest.raises(InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def test_replicas_may_have_experts():
    for zero in (0, 1):
        assert checked(ParallelConfig(data=2, zero=zero), config_of()).data == 2

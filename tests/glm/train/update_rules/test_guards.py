"""Guards against their formulas in float64, and pytorch-optimizer where it is installed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from glm.precision import PrecisionPolicy
from glm.train.optimizer import MixedPrecisionAdamW
from glm.train.update_rules import OptimizerConfig
from glm.train.update_rules.config import GuardConfig
from glm.train.update_rules.guards import AdaGC, SkipStep
from tests.glm.train.update_rules.formulas import (
    RATE,
    STEPS,
    Net,
    adamw,
    by_formula,
    close,
    history,
    moments,
    trained,
)


def test_adagc_clips_each_tensor_by_its_past():
    guard, past = AdaGC(), None
    rng = np.random.default_rng(0)
    for t in range(140):
        norm = abs(rng.normal(1, 0.1)) * (20 if t == 120 else 1)
        gradients = {"a": torch.full((4,), norm / 2), "never": torch.zeros(3)}
        share = guard.clip(gradients, {n: g.norm() for n, g in gradients.items()}, 0.5)
        if t < 100:
            kept = 0.5 * norm
            past = kept if past is None else min(past, kept)
        else:
            kept = norm * min(1.0, 1.05 * past / norm)
            past = 0.98 * past + 0.02 * kept
        assert gradients["a"].norm().item() == pytest.approx(kept, rel=1e-5)
        if t == 120:
            assert kept < norm / 10
            assert share.item() == pytest.approx(0.5)
    # A tensor that had no gradient is not frozen by it.
    late = {"never": torch.ones(4)}
    guard.clip(late, {"never": torch.tensor(2.0)}, 1.0)
    assert torch.equal(late["never"], torch.ones(4))


def test_spam_is_its_formula():
    config = OptimizerConfig(clip=0.0, beta2=0.999, guard=GuardConfig(spam="spam", reset=10))
    ours, _, _ = trained(config)
    reset = [t for t in range(2, STEPS + 1) if t % 10 == 0]

    def age(t):
        return t if t < 10 else t % 10 + 1

    def rate(t):
        return RATE * (1 - 0.99 * 0.5 * (1 + math.cos(math.pi * (age(t) - 1) / 150)) if t >= 10 else 1.0)

    def direction(name, g, memory, t):
        if t in reset:
            memory.clear()
        m, s = moments(g, memory, age(t), b2=0.999)
        return m / (s + 1e-8)

    close(ours, by_formula(direction, rate=rate))
    # A spike of one element is cut at sqrt(5000 v), v before it.
    model = Net()
    optimizer = MixedPrecisionAdamW(
        model, dataclasses.replace(config, guard=GuardConfig(spam="spam")), PrecisionPolicy()
    )
    for step in range(30):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if step == 29:
            model.one.weight.grad[2, 3] = 1e6
            v = optimizer.moments()["exp_avg_sq/one.weight"][2, 3].item()
            m = optimizer.moments()["exp_avg/one.weight"][2, 3].item()
        optimizer.gradients(1.0)
        optimizer.step_with(RATE, clip=0.0)
        optimizer.zero_grad()
    now = optimizer.moments()["exp_avg/one.weight"][2, 3].item()
    assert now == pytest.approx(0.9 * m + 0.1 * math.sqrt(5000 * v), rel=1e-5)


def test_stable_spam_is_pytorch_optimizers():
    theirs = pytest.importorskip("pytorch_optimizer").StableSPAM
    model = Net()
    reference = theirs(
        model.parameters(), lr=RATE, betas=(0.9, 0.999), weight_decay=0.0, t_max=None, eps=1e-8
    )
    for gradients in history():
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        reference.step()
    config = OptimizerConfig(
        clip=0.0, beta2=0.999, weight_decay=0.0, guard=GuardConfig(spam="stable", reset=1000)
    )
    ours, _, _ = trained(config)
    close(ours, {name: p.detach().double() for name, p in model.named_parameters()}, tolerance=1e-5)


def test_stable_spam_is_its_formula():
    def direction(name, g, memory, t):
        largest = g.abs().max()
        for key, value, beta in (("max", largest, 0.999),):
            memory[key] = beta * memory.get(key, 0) + (1 - beta) * value
        bound = memory["max"] / (1 - 0.999**t)
        g = torch.where(g.abs() > bound, g / largest * bound, g)
        norm = g.norm()
        memory["n1"] = 0.7 * memory.get("n1", 0) + 0.3 * norm
        memory["n2"] = 0.9 * memory.get("n2", 0) + 0.1 * norm**2
        target = memory["n1"] / (1 - 0.7**t) / ((memory["n2"] / (1 - 0.9**t)).sqrt() + 1e-8)
        return adamw(name, g / norm * target, memory, t)

    ours, _, _ = trained(OptimizerConfig(clip=0.0, guard=GuardConfig(spam="stable", reset=0)))
    close(ours, by_formula(direction))


def test_skip_step_leaves_out_what_stands_out_and_nothing_else():
    rng = np.random.default_rng(0)
    guard = SkipStep(6.0)
    losses = 3 + 0.02 * rng.standard_normal(400)
    losses[[100, 101, 250]] = 9.0
    losses[300] = math.nan
    skipped = [t for t, loss in enumerate(losses) if guard.skips(float(loss), 1.0)]
    # A spike does not hide the next one, and a NaN neither skips for ever nor lets everything through.
    assert skipped == [100, 101, 250]
    high = SkipStep(6.0)
    flags = [high.skips(1.0, norm) for norm in [1 + 0.01 * x for x in rng.standard_normal(200)] + [3.0] * 200]
    # A lasting new level is let in after a while.
    assert flags[200]
    assert not any(flags[-50:])


def test_a_step_left_out_changes_nothing_and_is_no_overflow():
    config = OptimizerConfig(guard=GuardConfig(skip_step=6.0))
    rng = np.random.default_rng(1)
    losses = list(3 + 0.01 * rng.standard_normal(70))
    losses[69] = 10.0
    model = Net()
    optimizer = MixedPrecisionAdamW(model, config, PrecisionPolicy())
    for loss in losses:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = {n: t.clone() for n, t in {**optimizer.masters(), **optimizer.moments()}.items()}
        optimizer.loss = loss
        optimizer.gradients(1.0)
        applied = optimizer.step_with(RATE, clip=1.0)
        optimizer.zero_grad()
    assert not applied
    assert not optimizer.overflowed
    assert optimizer.guards.told == {"guard/-/left_out": 1.0}
    after = {**optimizer.masters(), **optimizer.moments()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_norm_of_an_update_is_bounded_by_its_past():
    config = OptimizerConfig(kind="lion", clip=0.0, weight_decay=0.0, guard=GuardConfig(update_norm=2.0))
    model = Net()
    optimizer = MixedPrecisionAdamW(model, config, PrecisionPolicy())
    norms = []
    for step in range(30):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for i, parameter in enumerate(model.parameters()):
            # Lion's update has norm sqrt(number of elements with a gradient): few of them, and then all.
            parameter.grad = torch.ones_like(parameter) * (step == 25 or i == step % 2)
            optimizer.state[parameter]["exp_avg"].zero_()
        optimizer.gradients(1.0)
        optimizer.step_with(1.0, clip=0.0)
        optimizer.zero_grad()
        moved = sum(float((p.detach() - before[name]).square().sum()) for name, p in model.named_parameters())
        norms.append(math.sqrt(moved))
    past = norms[:25]
    bound = np.mean(past) + 2 * np.std(past, ddof=1)
    assert norms[25] == pytest.approx(bound, rel=1e-5)
    assert norms[24] == pytest.approx(math.sqrt(88), rel=1e-6)

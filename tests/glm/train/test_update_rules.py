"""Every update rule and guard against its formula in float64, torch's Muon, and pytorch-optimizer where it is installed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from glm.distributed.config import ParallelConfig
from glm.errors import InputError
from glm.model.config import AttentionConfig, ModelConfig
from glm.model.transformer import Transformer
from glm.precision import Policy
from glm.train.config import TrainConfig
from glm.train.optimizer import MixedPrecisionAdamW
from glm.train.update_rules import RULES, OptimizerConfig
from glm.train.update_rules.config import GuardConfig, MuonConfig, RateFactors, SlowMomentumConfig
from glm.train.update_rules.guards import AdaGC, SkipStep
from glm.train.update_rules.muon import COEFFICIENTS, matrix_rows, orthogonalized

RATE, STEPS = 1e-2, 25


class Net(nn.Module):
    """Two hidden matrices, an embedding, an output projection and vectors, under the names that a transformer has."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8, bias=False)
        self.projection = nn.Linear(8, 11, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)


def history(steps=STEPS, seed=1):
    """For each step one gradient a parameter, whose sizes differ a thousandfold, with a spike at step 21."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in Net().named_parameters()}
    sizes = {name: 10.0 ** -(i % 4) for i, name in enumerate(shapes)}
    return [
        {
            name: sizes[name] * (50 if step == 21 else 1) * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }
        for step in range(steps)
    ]


def trained(config, *, steps=STEPS, rates=None, peak=RATE, policy="fp32", losses=None):
    model = Net()
    optimizer = MixedPrecisionAdamW(model, config, Policy(precision=policy), peak=peak)
    applied = []
    for step, gradients in enumerate(history(steps)):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone().to(parameter.dtype)
        optimizer.loss = losses[step] if losses else 1.0
        optimizer.accumulate()
        optimizer.gradients(1.0)
        applied.append(optimizer.step_with(rates[step] if rates else RATE, clip=config.clip))
        optimizer.zero_grad()
    return {name: p.detach().double() for name, p in optimizer.masters().items()}, optimizer, applied


def by_formula(direction, *, decay=0.1, clip=0.0, steps=STEPS, rate=lambda t: RATE, decayed=None):
    """w after the updates u = direction(name, g, memory, t), in float64."""
    weights = {name: p.detach().double().clone() for name, p in Net().named_parameters()}
    memory = {name: {} for name in weights}
    for t, gradients in enumerate(history(steps), 1):
        total = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        factor = min(1.0, clip / (total + 1e-6)) if clip else 1.0
        for name, w in weights.items():
            u = direction(name, gradients[name].double() * factor, memory[name], t)
            share = rate(t) * decay if w.dim() == 2 else 0.0
            if decayed is not None:
                share = decayed(name, w, u, share)
            weights[name] = w - share * w - rate(t) * u
    return weights


def moments(g, memory, t, b1=0.9, b2=0.95):
    memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
    memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g * g
    return memory["m"] / (1 - b1**t), (memory["v"] / (1 - b2**t)).sqrt()


def adamw(name, g, memory, t):
    m, s = moments(g, memory, t)
    return m / (s + 1e-8)


def atan2(name, g, memory, t):
    m, s = moments(g, memory, t)
    return 1.27 * torch.atan2(m, s)


def lion(name, g, memory, t):
    m = memory.get("m", torch.zeros_like(g))
    memory["m"] = 0.95 * m + 0.05 * g
    return torch.sign(0.9 * m + 0.1 * g)


def ademamix(name, g, memory, t, warmup=10):
    m, s = moments(g, memory, t)
    half_lives = [math.log(0.5) / math.log(b) for b in (0.9, 0.99)]
    b3 = min(0.99, 0.5 ** (1 / (half_lives[0] + min(1, t / warmup) * (half_lives[1] - half_lives[0]))))
    memory["s"] = b3 * memory.get("s", 0) + (1 - b3) * g
    return (m + 5 * min(1, t / warmup) * memory["s"]) / (s + 1e-8)


def soap(name, g, memory, t):
    if name in ("one.weight", "two.weight"):
        if t > 1:
            left, right = memory["basis"]
            memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
            memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * (left.T @ g @ right) ** 2
            m, v = memory["m"] / (1 - 0.9 ** (t - 1)), memory["v"] / (1 - 0.95 ** (t - 1))
            u = left @ ((left.T @ m @ right) / (v.sqrt() + 1e-8)) @ right.T
        for key, product in (("L", g @ g.T), ("R", g.T @ g)):
            memory[key] = 0.95 * memory.get(key, 0) + 0.05 * product
        if t == 1:
            memory["basis"] = [torch.linalg.eigh(memory[key])[1].flip(-1) for key in "LR"]
            return torch.zeros_like(g)
        if (t - 1) % 10 == 0:
            fresh = []
            for key, basis, dim in zip("LR", memory["basis"], (0, 1), strict=True):
                order = torch.argsort((basis.T @ memory[key] @ basis).diagonal(), descending=True)
                memory["v"] = memory["v"].index_select(dim, order)
                fresh.append(torch.linalg.qr(memory[key] @ basis[:, order])[0])
            memory["basis"] = fresh
        return u
    return adamw(name, g, memory, t)


def newton_schulz(x):
    a, b, c = COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def muon(name, g, memory, t):
    if name not in ("one.weight", "two.weight"):
        return adamw(name, g, memory, t)
    memory["m"] = 0.95 * memory.get("m", 0) + 0.05 * g
    return 0.2 * math.sqrt(max(g.shape)) * newton_schulz(0.05 * g + 0.95 * memory["m"])


FORMULAS = {
    "adamw": adamw,
    "adam-atan2": atan2,
    "lion": lion,
    "ademamix": ademamix,
    "soap": soap,
    "muon": muon,
}
SLOW = SlowMomentumConfig(warmup=10, beta3=0.99)


@pytest.fixture(autouse=True)
def products_in_fp32(monkeypatch):
    """Newton-Schulz is in bf16 where a machine has units for it: formulas are compared in fp32 on every machine."""
    monkeypatch.setattr("glm.train.update_rules.muon.multiplies_natively", lambda dtype: False)


def close(ours, expected, *, tolerance=2e-5):
    for name, w in expected.items():
        torch.testing.assert_close(ours[name], w, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", RULES)
def test_every_rule_is_its_formula(kind):
    # A bound that is never met: AdamW too goes through its rule instead of torch's kernel.
    ours, _, _ = trained(OptimizerConfig(kind=kind, clip=1.0, slow=SLOW, guard=GuardConfig(update_norm=1e9)))
    # SOAP's eigenvectors are known to about 2^-24 / (what their eigenvalues differ by, of the largest).
    close(ours, by_formula(FORMULAS[kind], clip=1.0), tolerance=2e-3 if kind == "soap" else 2e-5)


def test_adamws_rule_is_torchs_kernel():
    fused, _, _ = trained(OptimizerConfig())
    rule, _, _ = trained(OptimizerConfig(guard=GuardConfig(update_norm=1e9)))
    close(rule, fused, tolerance=1e-6)


@pytest.mark.parametrize("decay", ["independent", "adamc"])
@pytest.mark.parametrize("update_norm", [0.0, 1e9])
def test_kinds_of_decay(decay, update_norm):
    rates = [RATE * (1 - step / 30) for step in range(STEPS)]
    config = OptimizerConfig(decay=decay, clip=0.0, guard=GuardConfig(update_norm=update_norm))
    ours, _, _ = trained(config, rates=rates, peak=RATE)

    def decayed(name, w, u, share):
        if not share or (decay == "adamc" and name == "projection.weight"):
            return share
        now = share / 0.1
        return now / RATE * 0.1 if decay == "independent" else now * (now / RATE) * 0.1

    close(ours, by_formula(adamw, rate=lambda t: rates[t - 1], decayed=decayed))


def test_cautious_keeps_what_points_the_gradients_way():
    def direction(name, g, memory, t):
        u = lion(name, g, memory, t)
        mask = (u * g > 0).double()
        return u * mask / mask.mean().clamp_min(1e-3)

    ours, _, _ = trained(OptimizerConfig(kind="lion", cautious=True, clip=0.0))
    close(ours, by_formula(direction))


def test_cautious_decay_takes_only_what_the_update_shrinks():
    ours, _, _ = trained(OptimizerConfig(cautious_decay=True, clip=0.0))
    close(ours, by_formula(adamw, decayed=lambda name, w, u, share: share * (u * w > 0).double()))


def test_rates_by_group_and_an_embedding_that_does_not_decay():
    config = OptimizerConfig(
        clip=0.0, decay_embedding=False, rates=RateFactors(embedding=3.0, output=0.5, vectors=2.0, hidden=0.1)
    )
    ours, optimizer, _ = trained(config)
    factors = {"embedding.weight": 3.0, "projection.weight": 0.5, "one.bias": 2.0}
    weights = {name: p.detach().double().clone() for name, p in Net().named_parameters()}
    memory = {name: {} for name in weights}
    for t, gradients in enumerate(history(), 1):
        for name, w in weights.items():
            rate = RATE * factors.get(name, 0.1)
            decay = 0.0 if name in ("embedding.weight", "one.bias") else 0.1
            u = adamw(name, gradients[name].double(), memory[name], t)
            weights[name] = w - rate * decay * w - rate * u
    close(ours, weights)
    assert len(optimizer.param_groups) == 4


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_is_torchs(scale):
    """Theirs iterates in bf16: ten steps of rate .01 differ by its rounding, u = 2^-8 of updates of size ``scale``."""
    config = MuonConfig(scale="rms" if scale == "match_rms_adamw" else "spectral")
    ours, _, _ = trained(OptimizerConfig(kind="muon", muon=config, clip=0.0), steps=10)
    model = Net()
    matrices = {"one.weight": model.one.weight, "two.weight": model.two.weight}
    theirs = torch.optim.Muon(
        list(matrices.values()), lr=RATE, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn=scale
    )
    for gradients in history(10):
        for name, parameter in matrices.items():
            parameter.grad = gradients[name].clone()
        theirs.step()
    for name, parameter in matrices.items():
        torch.testing.assert_close(ours[name], parameter.detach().double(), rtol=0, atol=10 * RATE * 0.02)


def test_muon_orthogonalizes_each_matrix_of_a_weight():
    generator = torch.Generator().manual_seed(2)
    matrices = [
        torch.randn(shape, generator=generator) for shape in ((8, 8), (16, 8), (8, 16), (3, 8, 16), (5, 9))
    ]
    for given, image in zip(matrices, orthogonalized(matrices), strict=True):
        assert image.shape == given.shape
        for one, expected in zip(
            image.reshape(-1, *image.shape[-2:]), given.reshape(-1, *given.shape[-2:]), strict=True
        ):
            torch.testing.assert_close(one.double(), newton_schulz(expected.double()), rtol=0, atol=1e-4)
    model = Transformer(ModelConfig(vocabulary=11, layers=1, hidden=8, heads=2, length=8))
    path = "layers.0.attention.query_key_value.weight"
    assert matrix_rows(model, per_head=False)[path] == (8, 8, 8)
    assert matrix_rows(model, per_head=True)[path] == (4,) * 6
    up = "layers.0.feed_forward.up.weight"
    assert sum(matrix_rows(model, per_head=False)[up]) == model.state_dict()[up].shape[0]
    # A head's update has the singular values of a head's matrix, whatever the others' gradients are.
    for per_head in (False, True):
        config = OptimizerConfig(kind="muon", muon=MuonConfig(per_head=per_head), weight_decay=0.0)
        optimizer = MixedPrecisionAdamW(model, config, Policy())
        before = model.state_dict()[path].clone()
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if name == path:
                parameter.grad[:4] *= 1e-3
        optimizer.gradients(1.0)
        optimizer.step_with(RATE, clip=0.0)
        optimizer.zero_grad()
        moved = (model.state_dict()[path] - before)[:4] / RATE
        assert (torch.linalg.svdvals(moved).min() > 0.2) == per_head


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
        model, dataclasses.replace(config, guard=GuardConfig(spam="spam")), Policy()
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
    optimizer = MixedPrecisionAdamW(model, config, Policy())
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
    optimizer = MixedPrecisionAdamW(model, config, Policy())
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


@pytest.mark.parametrize(
    "config",
    [
        *(OptimizerConfig(kind=kind, slow=SLOW) for kind in RULES),
        OptimizerConfig(kind="lion", cautious=True, guard=GuardConfig(update_norm=2.0, skip_step=6.0)),
        OptimizerConfig(guard=GuardConfig(adagc=True)),
        OptimizerConfig(guard=GuardConfig(spam="stable", reset=7)),
        OptimizerConfig(guard=GuardConfig(spam="spam", reset=7)),
        OptimizerConfig(decay="adamc", zclip=True),
    ],
    ids=lambda c: f"{c.kind}-{c.guard.spam}-{c.decay}",
)
@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_a_saved_state_goes_on_to_the_bit(config, policy):
    def on(model, optimizer, steps):
        for gradients in steps:
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name].clone().to(parameter.dtype)
            optimizer.accumulate()
            optimizer.gradients(1.0)
            optimizer.step_with(RATE, clip=1.0)
            optimizer.zero_grad()

    steps = history(40)
    one = Net()
    first = MixedPrecisionAdamW(one, config, Policy(precision=policy))
    on(one, first, steps[:20])
    weights, kept = (
        {n: t.detach().clone() for n, t in d.items()} for d in (first.masters(), first.moments())
    )
    counters = first.counters()
    on(one, first, steps[20:])
    two = Net()
    second = MixedPrecisionAdamW(two, config, Policy(precision=policy))
    second.load(masters=weights, moments=kept)
    second.load_counters(counters)
    on(two, second, steps[20:])
    for name, tensor in {**first.masters(), **first.moments()}.items():
        assert torch.equal(tensor, {**second.masters(), **second.moments()}[name]), name


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("StableAdamW", lambda: OptimizerConfig(kind="lion", update_clipping=True)),
        ("second moments", lambda: OptimizerConfig(kind="muon", guard=GuardConfig(spam="spam"))),
        ("choose one", lambda: GuardConfig(adagc=True, spam="spam")),
        ("must be positive", lambda: RateFactors(hidden=0.0)),
        ("lie in", lambda: MuonConfig(momentum=1.0)),
        (
            "whole matrices",
            lambda: TrainConfig(optimizer=OptimizerConfig(kind="muon"), parallel=ParallelConfig(data=2)),
        ),
        (
            "whole matrices",
            lambda: TrainConfig(
                optimizer=OptimizerConfig(kind="soap"), parallel=ParallelConfig(data=2, zero=0)
            ),
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(message, make):
    with pytest.raises(InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def test_muon_over_copies_is_allowed():
    TrainConfig(
        optimizer=OptimizerConfig(kind="muon"),
        parallel=ParallelConfig(data=2, zero=0),
        model=ModelConfig(attention=AttentionConfig(qk_norm=True)),
    )

"""A model of two matrices under each rule, and the rules' formulas in float64. Not a test itself."""

from __future__ import annotations

import math

import torch
from torch import nn

from glm.precision import PrecisionPolicy
from glm.train.optimizer import MixedPrecisionAdamW
from glm.train.update_rules.config import SlowMomentumConfig
from glm.train.update_rules.muon import COEFFICIENTS

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
    optimizer = MixedPrecisionAdamW(model, config, PrecisionPolicy(precision=policy), peak=peak)
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


def close(ours, expected, *, tolerance=2e-5):
    for name, w in expected.items():
        torch.testing.assert_close(ours[name], w, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")

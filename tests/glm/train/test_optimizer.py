"""AdamW against torch's in float64, what decays, three kinds of clipping, and what probes read from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from glm.errors import InputError
from glm.model.config import ModelConfig
from glm.model.transformer import Transformer
from glm.precision import PrecisionPolicy
from glm.train.optimizer import MixedPrecisionAdamW
from glm.train.update_rules import OptimizerConfig
from glm.train.update_rules.zclip import DEVIATIONS as ZCLIP_DEVIATIONS

U = 2.0**-24  # unit roundoff of fp32
STEPS = 20


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))


def gradients_of(model, steps=STEPS, seed=1):
    """For each step one fp32 gradient a parameter, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: 10.0 ** (2 - i) for i, (name, _) in enumerate(model.named_parameters())}
    return [
        {
            name: sizes[name] * torch.randn(p.shape, generator=generator)
            for name, p in model.named_parameters()
        }
        for _ in range(steps)
    ]


def give(optimizer, model, gradients, *, rate=1e-2, clip=0.0, scale=1.0):
    """One update from these gradients."""
    for name, parameter in model.named_parameters():
        parameter.grad = (gradients[name] * scale).to(parameter.dtype)
    optimizer.accumulate()
    summary = optimizer.gradients(scale)
    applied = optimizer.step_with(rate, clip=clip)
    optimizer.zero_grad()
    return summary.global_norm, applied


def close_to_float64(optimizer, expected, *, steps=STEPS):
    """Each step rounds a weight once for its decay and once for its update, which is small beside it."""
    for name, master in optimizer.masters().items():
        largest = expected[name].abs().max().item() + 1
        torch.testing.assert_close(
            master.detach().double(), expected[name], rtol=0, atol=3 * steps * U * largest
        )


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_is_torchs_in_float64(clip):
    model = small_model()
    exact = small_model().double()
    decayed = [p for p in exact.parameters() if p.dim() == 2]
    others = [p for p in exact.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    ours = MixedPrecisionAdamW(model, OptimizerConfig(), PrecisionPolicy(precision="fp32"))
    for gradients in gradients_of(model):
        for name, parameter in exact.named_parameters():
            parameter.grad = gradients[name].double()
        norm, applied = give(ours, model, gradients, clip=clip)
        assert applied
        total = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        assert norm == pytest.approx(total, rel=1e-6)
        if clip:
            nn.utils.clip_grad_norm_(exact.parameters(), clip)
        theirs.step()
    close_to_float64(ours, {name: p.detach() for name, p in exact.named_parameters()})


def test_half_weights_are_the_rounded_masters():
    for precision, scale in (("fp16", 4.0), ("bf16", 1.0)):
        model = small_model()
        optimizer = MixedPrecisionAdamW(model, OptimizerConfig(), PrecisionPolicy(precision=precision))
        half = PrecisionPolicy(precision=precision).compute_dtype
        for gradients in gradients_of(model, steps=3):
            # Gradients that the half format holds exactly, so that masters move as in fp32.
            held = {name: g.div(1000).to(half).float() for name, g in gradients.items()}
            give(optimizer, model, held, scale=scale)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == half
            assert torch.equal(parameter, optimizer.masters()[name].to(half))


def test_matrices_decay_and_vectors_do_not():
    model = Transformer(ModelConfig(vocabulary=11, layers=2, hidden=8, heads=2, length=8))
    optimizer = MixedPrecisionAdamW(
        model, OptimizerConfig(weight_decay=0.5), PrecisionPolicy(precision="fp32")
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    give(optimizer, model, {name: torch.zeros_like(p) for name, p in before.items()}, rate=0.1)
    for name, parameter in model.named_parameters():
        is_vector = "norm" in name or name.endswith("bias")
        assert is_vector == (parameter.dim() < 2), name
        torch.testing.assert_close(
            parameter.detach(), before[name] * (1.0 if is_vector else 1 - 0.1 * 0.5), rtol=4 * U, atol=0
        )


def test_stable_adamw_is_its_formula():
    model = small_model()
    config = OptimizerConfig(update_clipping=True)
    optimizer = MixedPrecisionAdamW(model, config, PrecisionPolicy(precision="fp32"))
    w = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(x) for name, x in w.items()}
    v = {name: torch.zeros_like(x) for name, x in w.items()}
    clipped = 0
    history = gradients_of(model)
    for t, gradients in enumerate(history, 1):
        if t % 7 == 0:  # a gradient that the second moment has not seen coming
            gradients = {name: 100 * g for name, g in gradients.items()}
        give(optimizer, model, gradients)
        for name, g in ((name, g.double()) for name, g in gradients.items()):
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            corrected = v[name] / (1 - 0.95**t)
            rms = (g * g / corrected.clamp_min(config.epsilon**2)).mean().sqrt().item()
            rate = 1e-2 / max(1.0, rms)
            clipped += rms > 1.5
            decay = 0.1 if w[name].dim() == 2 else 0.0
            w[name] *= 1 - rate * decay
            w[name] -= rate * m[name] / (1 - 0.9**t) / (corrected.sqrt() + config.epsilon)
    assert clipped >= 8
    close_to_float64(optimizer, w)


def test_zclip_bounds_a_norm_by_its_past():
    """Until a mean over the past is an exponential one (33 norms), it and the deviation are the plain ones."""
    model = nn.Linear(4, 1, bias=False)
    optimizer = MixedPrecisionAdamW(model, OptimizerConfig(zclip=True), PrecisionPolicy(precision="fp32"))
    direction = torch.tensor([[0.5, 0.5, 0.5, 0.5]])  # of norm 1
    norms = np.random.default_rng(0).uniform(0.9, 1.1, size=30)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(float(model.weight.grad.norm())))
    for norm in [*norms, 5.0]:
        give(optimizer, model, {"weight": direction * norm}, rate=1e-3)
    mean, deviation = norms.mean(), norms.std()
    z = (5.0 - mean) / deviation
    np.testing.assert_allclose(seen[:30], norms, rtol=1e-6)
    # The clipping factor is bound / (norm + 1e-6).
    assert seen[30] == pytest.approx(mean + ZCLIP_DEVIATIONS**2 / z * deviation, rel=1e-5)
    # What is remembered is the clipped norm.
    past = np.append(norms, mean + ZCLIP_DEVIATIONS**2 / z * deviation)
    assert optimizer.counters()["norm_mean"] == pytest.approx(past.mean(), rel=1e-6)
    assert optimizer.counters()["norm_variance"] == pytest.approx(past.var(), rel=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = small_model()
    optimizer = MixedPrecisionAdamW(model, OptimizerConfig(zclip=True), PrecisionPolicy(precision="fp32"))
    first, second = gradients_of(model, steps=2)
    give(optimizer, model, first)
    before = {name: p.detach().clone() for name, p in optimizer.masters().items()}
    counters = optimizer.counters()
    second["0.weight"][0, 0] = math.inf
    norm, applied = give(optimizer, model, second)
    assert (math.isinf(norm), applied) == (True, False)
    assert all(torch.equal(before[name], p) for name, p in optimizer.masters().items())
    assert optimizer.counters() == counters


@pytest.mark.parametrize("config", [OptimizerConfig(zclip=True), OptimizerConfig(update_clipping=True)])
def test_saved_state_goes_on_exactly(config):
    history = gradients_of(small_model(), steps=60)

    def optimizer_at(step):
        model = small_model()
        optimizer = MixedPrecisionAdamW(model, config, PrecisionPolicy(precision="fp32"))
        for gradients in history[:step]:
            give(optimizer, model, gradients, clip=1.0)
        return model, optimizer

    _, whole = optimizer_at(60)
    _, begun = optimizer_at(40)
    model, resumed = optimizer_at(0)
    resumed.load(masters=begun.masters(), moments=begun.moments())
    resumed.load_counters(begun.counters())
    assert [group["step"] for group in resumed.param_groups] == [40, 40]
    for gradients in history[40:]:
        give(resumed, model, gradients, clip=1.0)
    for name, master in whole.masters().items():
        assert torch.equal(master, resumed.masters()[name])
    assert whole.counters() == resumed.counters()


def test_groups_tell_instruments_what_torchs_would():
    model = small_model()
    config = OptimizerConfig(beta1=0.8, beta2=0.9, epsilon=1e-6)
    optimizer = MixedPrecisionAdamW(model, config, PrecisionPolicy(precision="bf16"))
    for gradients in gradients_of(model, steps=3):
        give(optimizer, model, gradients, rate=0.5)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["step"], group["lr"]) == ((0.8, 0.9), 1e-6, 3, 0.5)


def test_what_was_accumulated_is_shown_as_it_lies():
    model = small_model()
    optimizer = MixedPrecisionAdamW(model, OptimizerConfig(), PrecisionPolicy(precision="bf16"))
    for _ in range(2):  # two micro-batches
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0)
        optimizer.accumulate()
    summary = optimizer.gradients(1.0)
    assert all(g.dtype == torch.float32 and (g == 2.0).all() for g in summary.accumulated.values())
    fp16 = small_model()
    optimizer = MixedPrecisionAdamW(fp16, OptimizerConfig(), PrecisionPolicy(precision="fp16"))
    for parameter in fp16.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    summary = optimizer.gradients(4.0)
    assert all(g.dtype == torch.float16 and (g == 3.0).all() for g in summary.accumulated.values())
    assert all(g.dtype == torch.float32 and (g == 0.75).all() for g in summary.gradients.values())


@pytest.mark.parametrize(
    "wrong", [{"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": 0.0}, {"weight_decay": -1.0}, {"clip": -1.0}]
)
def test_impossible_constants_are_refused(wrong):
    with pytest.raises(InputError, match=r"optimizer\."):
        OptimizerConfig(**wrong)

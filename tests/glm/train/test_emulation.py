"""Emulated products against operands rounded and multiplied in float64; weights without masters against their formulas."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from glm.distributed.config import ParallelConfig
from glm.errors import InputError
from glm.model.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, ModelConfig
from glm.model.layers import Linear
from glm.precision import PrecisionPolicy
from glm.train.config import BatchConfig, TrainConfig
from glm.train.emulation import PRODUCTS, RECIPES, Emulation, EmulationConfig
from glm.train.engine import LocalEngine
from glm.train.optimizer import MixedPrecisionAdamW
from glm.train.update_rules import OptimizerConfig
from stabilitylab.formats import fake_quantize, rotate
from tests.glm.train.test_lever_state import batch
from tests.glm.train.update_rules.formulas import Net

SMALL = ModelConfig(vocabulary=31, layers=2, hidden=32, heads=2, length=16, norm="pre")


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = Linear(48, 32)


def layer_and_input():
    torch.manual_seed(0)
    layer = Layer()
    x = torch.randn(4, 16, 48)
    x[..., 5] *= 30
    return layer, x.requires_grad_()


def q(x, format):
    return fake_quantize(x, format).double() if format else x.double()


@pytest.mark.parametrize("products", ["forward", "grad-input", "grad-weight", ", ".join(PRODUCTS)])
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "none"])
def test_each_product_is_that_of_rounded_operands(recipe, products):
    layer, x = layer_and_input()
    config = EmulationConfig(recipe=recipe, products=products, sites="*", stochastic=False, hadamard=False)
    Emulation(layer, config, seed=1)
    activations, weights, gradients = config.formats
    y = layer.one(x)
    g = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(3))
    y.backward(g)
    on = {name: name in products for name in PRODUCTS}
    w, x_NI, g_NO = layer.one.weight.detach(), x.detach().reshape(-1, 48), g.reshape(-1, 32)

    def operand(t, format, product):
        return q(t, format if on[product] else "")

    forward = operand(x_NI, activations, "forward") @ operand(w, weights, "forward").T
    forward = forward + layer.one.bias.detach().double()
    grad_x = operand(g_NO, gradients, "grad-input") @ operand(w.T, weights, "grad-input").T
    grad_w = operand(g_NO.T, gradients, "grad-weight") @ operand(x_NI.T, activations, "grad-weight").T
    for ours, exact in (
        (y.detach().reshape(-1, 32), forward),
        (x.grad.reshape(-1, 48), grad_x),
        (layer.one.weight.grad, grad_w),
        (layer.one.bias.grad, g_NO.double().sum(0)),
    ):
        # Sums of at most 64 products in fp32.
        torch.testing.assert_close(
            ours.double(), exact, rtol=0, atol=64 * 2.0**-24 * float(exact.abs().max())
        )
    plain = x_NI.double() @ w.double().T + layer.one.bias.detach().double()
    assert (float((forward - plain).abs().max()) > 1e-3) == on["forward"]


def test_the_weight_gradient_of_rotated_operands():
    layer, x = layer_and_input()
    config = EmulationConfig(recipe="nvfp4", products="grad-weight", sites="*", stochastic=False)
    emulation = Emulation(layer, config, seed=1)
    g = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(3))
    layer.one(x).backward(g)
    g_ON, x_IN = (rotate(t, emulation.signs) for t in (g.reshape(-1, 32).T, x.detach().reshape(-1, 48).T))
    exact = q(g_ON, "nvfp4") @ q(x_IN, "nvfp4").T
    torch.testing.assert_close(
        layer.one.weight.grad.double(), exact, rtol=0, atol=64 * 2.0**-24 * float(exact.abs().max())
    )
    true = g.reshape(-1, 32).double().T @ x.detach().reshape(-1, 48).double()
    assert float((exact - true).norm() / true.norm()) < 0.2


def test_stochastic_gradients_are_right_on_average_and_a_function_of_seed_update_and_layer():
    layer, x = layer_and_input()
    # Scales rounded up cut nothing off, so every number lies between two of the format's.
    config = EmulationConfig(recipe="mxfp4", gradients="mxfp4-up", products="grad-input", sites="*")
    emulation = Emulation(layer, config, seed=1)
    w = q(layer.one.weight.detach().T, "mxfp4")
    g = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(3)) / 8

    def drawn(update, row=0):
        emulation.begin(update, row)
        x.grad = None
        layer.one(x).backward(g)
        return x.grad.clone().double()

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    assert not torch.equal(drawn(0), drawn(0, row=2))
    draws = torch.stack([drawn(update) for update in range(200)])
    error = (draws.mean(0).reshape(-1, 48) - g.reshape(-1, 32).double() @ w.T).abs()
    spread = draws.std(0).reshape(-1, 48) / 200**0.5
    # Of 3,072 means none lies five deviations away, but by rounding of the sums.
    assert (error <= 5 * spread + 1e-6).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "none"])
def test_recipes_train_and_go_on_to_the_bit(recipe, precision):
    config = TrainConfig(
        model=SMALL,
        batch=BatchConfig(rows=2),
        precision=precision,
        emulate=EmulationConfig(recipe=recipe, spared="layers.1.feed_forward.*"),
    )
    one = LocalEngine(config)
    assert len(one._emulation.sites) == 6
    losses = []

    def train(engine, steps):
        for step in steps:
            losses.append(engine.forward_backward(batch(step % 3), step))
            engine.gradients()
            engine.update(1e-2, clip=1.0)

    train(one, range(12))
    assert losses[-1] < losses[0]
    weights, moments = ({n: t.detach().clone() for n, t in d.items()} for d in one.tensors())
    two = LocalEngine(config)
    two.load_tensors(weights, moments)
    two.load_state_dict(one.state_dict())
    train(one, range(12, 14))
    train(two, range(12, 14))
    for name, tensor in one.tensors()[0].items():
        assert torch.equal(tensor, two.tensors()[0][name]), name


def moved(kept, steps=200):
    """A weight of 1 pushed down by a thousandth of its last place at a time."""
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    config = OptimizerConfig(kind="lion", weight_decay=0.0, clip=0.0)
    optimizer = MixedPrecisionAdamW(model, config, PrecisionPolicy(precision="bf16"), kept=kept, seed=5)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.accumulate()
        optimizer.gradients(1.0)
        optimizer.step_with(2.0**-12, clip=0.0)
        optimizer.zero_grad()
    return model, optimizer


def test_kahan_loses_no_small_update():
    model, optimizer = moved("kahan")
    exact = 1 - 200 * 2.0**-12
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.float(), optimizer.masters()[name])
        kept = parameter.double() + optimizer.moments()[f"compensation/{name}"].double()
        # c has 8 bits of less than half a last place of w, 2^-9; each update rounds it once.
        torch.testing.assert_close(kept, torch.full_like(kept, exact), rtol=0, atol=200 * 2.0**-18)


def test_stochastic_rounding_loses_none_on_average():
    model, _ = moved("stochastic")
    values = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    # Every update moves a last place of 2^-8 with probability 2^-4: the variance of 200 of them is that of a binomial.
    deviation = 2.0**-8 * (200 * 2.0**-4 * (1 - 2.0**-4)) ** 0.5
    assert abs(values.mean().item() - (1 - 200 * 2.0**-12)) < 5 * deviation / len(values) ** 0.5
    assert values.std().item() == pytest.approx(deviation, rel=0.25)
    again, _ = moved("stochastic")
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_with_masters_bf16_weights_round_to_nearest():
    model, optimizer = moved("masters")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, optimizer.masters()[name].bfloat16())


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("choose one of", lambda: EmulationConfig(weights="fp3")),
        ("emulate.products", lambda: EmulationConfig(products="forward,sideways")),
        ("choose emulate.recipe", lambda: EmulationConfig(stochastic=True)),
        ("choose emulate.recipe", lambda: EmulationConfig(spared="layers.3.*")),
        (
            "parallel.data alone",
            lambda: TrainConfig(emulate=EmulationConfig(recipe="fp8"), parallel=ParallelConfig(tensor=2)),
        ),
        (
            "experts",
            lambda: TrainConfig(
                emulate=EmulationConfig(recipe="fp8"),
                model=dataclasses.replace(
                    SMALL, feed_forward=FeedForwardConfig(experts=ExpertsConfig(count=4))
                ),
            ),
        ),
        ("precision bf16", lambda: TrainConfig(bf16_weights="kahan")),
        (
            "names no linear layer",
            lambda: LocalEngine(
                TrainConfig(model=SMALL, emulate=EmulationConfig(recipe="fp8", sites="blocks.*"))
            ),
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(message, make):
    with pytest.raises(InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def test_emulation_goes_with_other_levers():
    config = TrainConfig(
        model=dataclasses.replace(
            SMALL, spectral=True, attention=AttentionConfig(gate="element", sink="learned")
        ),
        batch=BatchConfig(rows=2),
        precision="bf16",
        bf16_weights="stochastic",
        optimizer=OptimizerConfig(kind="muon"),
        emulate=EmulationConfig(recipe="nvfp4"),
    )
    engine = LocalEngine(config)
    for step in range(3):
        engine.forward_backward(batch(step), step)
        assert engine.gradients().is_finite
        assert engine.update(1e-2, clip=1.0)
    for name, master in engine.optimizer.masters().items():
        assert torch.equal(master, master.bfloat16().float()), name

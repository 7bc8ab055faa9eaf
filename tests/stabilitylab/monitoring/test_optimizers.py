"""Optimizers other than a single one of torch's: several, wrapped, scaled, and objects that are none."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stabilitylab import Monitor
from stabilitylab.errors import InputError
from tests.stabilitylab.recording import Recording


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def two(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(rest, lr=0.01), torch.optim.SGD(matrices, lr=0.1)


def test_updates_and_gradients_of_several_optimizers() -> None:
    model, sink = small(), Recording()
    optimizers = two(model)
    with Monitor(model, optimizers, every=1, sinks=[sink], detector=None) as monitor:
        for step in range(2):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            model(torch.randn(4, 8)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            monitor.step(step)
            for name, p in model.named_parameters():
                change = float((p.detach() - before[name]).square().mean().sqrt())
                # All of fewer than 256 weights is sampled; the change is taken in float32.
                assert sink_row(monitor, sink, step, f"update/{name}/rms") == pytest.approx(change, rel=1e-5)
                assert (step, f"gradient/{name}/l2", -1) in sink.rows
    assert "second_moment_l2" in sink.site(1, "1.weight")
    assert "second_moment_l2" not in sink.site(1, "0.weight")
    assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in optimizers)


def sink_row(monitor: Monitor, sink: Recording, step: int, metric: str) -> float:
    monitor.flush()
    return sink.rows[step, metric, -1]


def test_an_optimizer_that_accelerate_has_wrapped() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, sink = small(), Recording()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with Monitor(model, optimizer, every=1, sinks=[sink], detector=None) as monitor:
        accelerator.backward(model(torch.randn(4, 8)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(0)
    assert sink.rows[0, "update/0.weight/rms", -1] > 0
    assert sink.rows[0, "gradient/0.weight/l2", -1] > 0


class HandMade:
    def step(self) -> None: ...


def test_lazy_layers_are_refused_until_they_have_weights() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(InputError, match=r"^0\.weight is a parameter without a shape.*forward pass") as error:
        Monitor(model)
    assert "\n" not in str(error.value)
    model(torch.randn(2, 8))
    Monitor(model, torch.optim.SGD(model.parameters()), detector=None).close()


@pytest.mark.parametrize("optimizer", [HandMade(), "adam", [HandMade()], torch.optim.SGD])
def test_what_is_no_optimizer_is_refused(optimizer: Any) -> None:
    with pytest.raises(InputError, match=r"^optimizer is a \w+: .*gradients_ready") as error:
        Monitor(small(), optimizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("order", ["zero_grad before monitor.step", "monitor.step before zero_grad"])
def test_the_gradients_of_a_step_that_the_scaler_leaves_out(order: str) -> None:
    model, sink = small(), Recording()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with Monitor(model, optimizer, every=1, sinks=[sink], detector=None, scaler=scaler) as monitor:
        for step in range(3):
            loss = model(torch.randn(4, 8)).square().mean() * (math.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if order.startswith("zero_grad"):
                optimizer.zero_grad()
            monitor.step(step, loss=loss)
            optimizer.zero_grad()
    assert sink.steps("gradient/0.weight/l2") == [0, 1, 2]
    assert [sink.rows[step, "gradient/0.weight/nonfinite_fraction", -1] > 0 for step in range(3)] == [0, 1, 0]
    assert sink.rows[1, "precision/-/nonfinite_gradients", -1] == 6
    assert math.isnan(sink.rows[1, "train/-/gradient_norm", -1])
    assert "step" not in vars(scaler)


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_several_optimizers_under_one_scaler(scale: float) -> None:
    """The first optimizer's gradients are unscaled when it steps, the second's are not yet."""
    model, sink = small(), Recording()
    optimizers = two(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    model(torch.ones(4, 8)).square().mean().backward()
    expected = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with Monitor(model, optimizers, every=1, sinks=[sink], detector=None, scaler=scaler) as monitor:
        scaler.scale(model(torch.ones(4, 8)).square().mean()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        monitor.step(0)
    for name, norm in expected.items():
        # A power of two scales float32 exactly; the norm is of float64 sums.
        assert sink.rows[0, f"gradient/{name}/l2", -1] == pytest.approx(norm, rel=1e-6), name


def test_two_monitors_of_one_scaler_leave_it_as_it_was() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with Monitor(model, optimizer, detector=None, scaler=scaler):
        Monitor(model, optimizer, detector=None, scaler=scaler).close()
        assert "step" in vars(scaler)
    assert "step" not in vars(scaler)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))])
def test_a_copy_of_the_scaler_is_on_its_own(copied: Callable[[Any], Any]) -> None:
    model, sink = small(), Recording()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with Monitor(model, optimizer, every=1, sinks=[sink], detector=None, scaler=scaler):
        other = copied(scaler)
        twin = small()
        its = torch.optim.SGD(twin.parameters(), lr=0.1)
        other.scale(twin(torch.ones(2, 8)).sum()).backward()
        other.step(its)
        other.update()
        assert not torch.equal(twin[0].weight, model[0].weight)
        assert not scaler._per_optimizer_states


class Forgetful(torch.optim.AdamW):
    """As heavyball's: gradients are gone after the step, and the state lies one level further down."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p, state in self.state.items():
            self.state[p] = state.get(0, state)
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
                self.state[p] = {0: self.state[p]}


def test_an_optimizer_that_lets_go_of_gradients_and_nests_its_state() -> None:
    found = []
    for kind in (torch.optim.AdamW, Forgetful):
        model, sink = small(), Recording()
        optimizer = kind(model.parameters(), lr=0.01)
        with Monitor(model, optimizer, every=1, sinks=[sink], detector=None) as monitor:
            for step in range(3):
                model(torch.ones(4, 8) + step).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                monitor.step(step)
        found.append({key: v for key, v in sink.rows.items() if key[1].startswith("update/")})
    assert found[1].keys() == found[0].keys()
    assert len({name for _, name, _ in found[0] if name.endswith("/rms_t")}) == 6
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=1e-6, nan_ok=True), key

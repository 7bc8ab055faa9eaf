"""An optimizer that steps without gradients is told of once, and one whose gradients lie elsewhere never."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab import Monitor
from tests.stabilitylab.recording import Recording

Optimizer = torch.optim.Optimizer


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def backward(model: nn.Module) -> None:
    model(torch.randn(4, 8)).square().mean().backward()


def told(
    model: nn.Module, optimizers: Any, once: Callable[[int], object], *, every: int = 1, steps: int = 30
) -> list[tuple[int, str]]:
    sink = Recording()
    with Monitor(model, optimizers, every=every, sinks=[sink], detector=None) as monitor:
        for step in range(steps):
            once(step)
            monitor.step(step)
    return [(event.step, event.data["reason"]) for event in sink.events if event.kind == "empty-steps"]


@pytest.mark.parametrize("every", [1, 5, 0])
def test_gradients_gone_before_the_step(every: int, caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())

    def once(step: int) -> None:
        backward(model)
        optimizer.zero_grad()
        optimizer.step()

    with caplog.at_level(logging.WARNING, "stabilitylab"):
        ((step, reason),) = told(model, optimizer, once, every=every)
    assert step == 19
    assert reason == (
        "AdamW stepped 20 times in a row, and none of its parameters had a gradient: it changes nothing; "
        "call zero_grad() after its step, not between backward() and the step"
    )
    assert [record.getMessage() for record in caplog.records].count(reason) == 1


def test_another_models_parameters() -> None:
    model = small()
    optimizer = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)

    def once(step: int) -> None:
        backward(model)
        optimizer.step()
        optimizer.zero_grad()

    ((step, reason),) = told(model, optimizer, once)
    assert step == 19
    assert reason.endswith("make it of the parameters of the model that is trained: it holds none of them")


def test_frozen_parameters() -> None:
    model = small()
    optimizers = [torch.optim.SGD(model[0].parameters()), torch.optim.SGD(model[2].parameters())]
    model[0].requires_grad_(False)

    def once(step: int) -> None:
        backward(model)
        for optimizer in optimizers:
            optimizer.step()

    ((_, reason),) = told(model, optimizers, once)
    assert reason.endswith("all of them are frozen (requires_grad is False)")


def test_each_of_several_is_told_of_once() -> None:
    model = small()
    other = copy.deepcopy(model)
    wrong: list[Optimizer] = [torch.optim.SGD(other.parameters()), torch.optim.AdamW(other.parameters())]

    def once(step: int) -> None:
        backward(model)
        for optimizer in wrong:
            optimizer.step()

    assert [step for step, _ in told(model, wrong, once)] == [19, 19]


def test_some_in_a_row_are_no_mistake() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def once(step: int) -> None:
        if step % 15 == 14:
            backward(model)
        optimizer.step()
        optimizer.zero_grad()

    assert not told(model, optimizer, once)


def test_a_closure_makes_the_gradients_within_the_step() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> float:
        backward(model)
        return 0.0

    def once(step: int) -> None:
        optimizer.zero_grad()
        optimizer.step(closure)

    assert not told(model, optimizer, once)


class Decoupled(Optimizer):
    """Holds its gradients beside ``.grad``, as some fused optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.decoupled_grad, alpha=group["lr"])


def test_gradients_that_lie_elsewhere() -> None:
    model = small()
    optimizer = Decoupled(model.parameters())

    def once(step: int) -> None:
        backward(model)
        for p in model.parameters():
            p.decoupled_grad, p.grad = p.grad, None  # type: ignore[attr-defined]
        optimizer.step()

    assert not told(model, optimizer, once)


@pytest.mark.parametrize("holds", ["the model's", "one of its own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_that_has_stepped_within_the_backward_pass(dtype: torch.dtype, holds: str) -> None:
    """Each parameter is updated as soon as its gradient is there, and the gradient dropped; the loop steps a dummy of all. Steps
    are as large as Adam's, at a rate that grows from zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 2, bias=False)).to(dtype)
    model[1].bias.requires_grad_(False)
    now = 0

    def update(p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(p.grad.sign(), alpha=1e-7 * now)
        p.grad = None

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(update)
    dummy = [nn.Parameter(torch.zeros(1, 1))]
    optimizer = torch.optim.SGD(model.parameters() if holds == "the model's" else dummy)

    def once(step: int) -> None:
        nonlocal now
        now = step
        model(torch.randn(4, 64, dtype=dtype)).square().mean().backward()
        optimizer.step()

    assert not told(model, optimizer, once)


def test_parts_of_no_elements_are_not_judged() -> None:
    model = small()
    model.append(nn.Identity())
    model[3].part = nn.Parameter(torch.empty(0))
    optimizer = torch.optim.SGD([model[3].part])

    def once(step: int) -> None:
        backward(model)
        optimizer.step()

    assert not told(model, optimizer, once)


def test_masters_are_the_models_parameters() -> None:
    """fp32 masters that get their gradients elsewhere than a half-precision model."""
    model = small().to(torch.bfloat16)
    masters: dict[str, Tensor] = {n: p.detach().float() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(masters.values(), lr=0.1)
    sink = Recording()
    with Monitor(model, optimizer, every=1, parameters=masters, sinks=[sink], detector=None) as monitor:
        for step in range(5):
            model(torch.randn(4, 8, dtype=torch.bfloat16)).square().mean().backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                masters[name].grad = p.grad.float()
            optimizer.step()
            model.zero_grad()
            monitor.step(step)
    assert not [event for event in sink.events if event.kind == "empty-steps"]

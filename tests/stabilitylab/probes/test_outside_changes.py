"""The probe reports changes outside of updates, for the right parameter; it reports no update's own change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stabilitylab import Monitor
from stabilitylab.probes.outside_changes import OutsideChanges, jumps, numeric_settings
from stabilitylab.probes.updates import UpdateProbe
from stabilitylab.telemetry import Event, Samples

STEPS, AT = 14, 10
Act = Callable[[nn.Module, torch.optim.Optimizer], object]


class Events:
    def __init__(self) -> None:
        self.all: list[Event] = []

    def write(self, samples: Samples, events: Any) -> None:
        self.all += events

    def close(self) -> None:
        pass


def changes(
    act: Act | None, *, optimizer: str = "AdamW", every_step: bool = False, dtype: torch.dtype = torch.float32
) -> list[Event]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Tanh(), nn.Linear(128, 8)).to(dtype)
    stepper = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-2)
    sink = Events()
    with Monitor(model, stepper, every=1, sinks=[sink], probes=[UpdateProbe()], detector=None) as monitor:
        for step in range(STEPS):
            with torch.no_grad():
                if act is not None and (step == AT or every_step):
                    act(model, stepper)
            stepper.zero_grad()
            loss = model(torch.randn(16, 64, dtype=dtype)).square().mean()
            loss.backward()
            stepper.step()
            monitor.step(step)
    return sink.all


def weight(model: nn.Module, name: str) -> torch.Tensor:
    return dict(model.named_parameters())[name].data


ACTS: dict[str, tuple[str, Act]] = {
    "one weight": ("0.weight", lambda m, _: weight(m, "0.weight")[77].__setitem__(3, 1e4)),
    "a row": ("0.weight", lambda m, _: weight(m, "0.weight")[5].mul_(100)),
    "NaN": ("3.weight", lambda m, _: weight(m, "3.weight")[1].__setitem__(1, float("nan"))),
    "signs": ("0.weight", lambda m, _: weight(m, "0.weight").neg_()),
    "a bias": ("3.bias", lambda m, _: weight(m, "3.bias").add_(3)),
    "a gain": ("1.weight", lambda m, _: weight(m, "1.weight").mul_(50)),
}


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_a_change_from_outside_is_told_of_its_parameter(name: str, optimizer: str) -> None:
    site, act = ACTS[name]
    (event,) = changes(act, optimizer=optimizer)
    assert (event.step, event.kind, event.data["site"]) == (AT, "parameter-changed", site)


def test_a_step_that_is_left_out_hides_nothing() -> None:
    """Trainers pass over an update whose gradient is not finite, which a NaN among the weights makes it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    stepper, sink = torch.optim.AdamW(model.parameters()), Events()
    with Monitor(model, stepper, every=1, sinks=[sink], probes=[UpdateProbe()], detector=None) as monitor:
        for step in range(STEPS):
            if step == AT:
                weight(model, "1.weight")[2, 2] = float("nan")
            stepper.zero_grad()
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            if loss.isfinite() and step != AT - 2:
                stepper.step()
            monitor.step(step)
    (event,) = sink.all
    assert (event.step, event.kind, event.data["site"]) == (AT, "parameter-changed", "1.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_formats(dtype: torch.dtype) -> None:
    assert changes(None, dtype=dtype) == []
    (event,) = changes(lambda m, _: weight(m, "0.weight").mul_(2), dtype=dtype)
    assert event.data["factor"] == pytest.approx(2, rel=0.01)


def test_updates_and_habits_are_no_changes() -> None:
    for optimizer in ("AdamW", "SGD", "RMSprop"):
        assert changes(None, optimizer=optimizer) == []
    normed: Act = lambda m, _: weight(m, "0.weight").div_(weight(m, "0.weight").norm(dim=1, keepdim=True))  # noqa: E731
    assert changes(normed, every_step=True) == []


def test_the_optimizer_s_state_and_settings() -> None:
    (event,) = changes(lambda _, o: [state["exp_avg_sq"].zero_() for state in o.state.values()])
    assert (event.step, event.kind, event.data["count"], event.data["of"]) == (AT, "moments-changed", 6, 6)
    (event,) = changes(lambda _, o: o.param_groups[0].update(weight_decay=1.0))
    assert (event.kind, event.data["setting"], event.data["after"]) == (
        "optimizer-changed",
        "weight_decay",
        1.0,
    )
    assert changes(lambda _, o: o.param_groups[0].update(lr=1e-5)) == []  # the rate is recorded as such
    slow: Act = lambda _, o: o.param_groups[0].update(weight_decay=o.param_groups[0]["weight_decay"] * 1.1)  # noqa: E731
    assert changes(slow, every_step=True) == []


class DistanceFree(torch.optim.SGD):
    """Keeps a counter, a sum and an estimate in its parameter groups, as schedule-free and D-adapting optimizers do."""

    def __init__(self, parameters: Any, lr: float = 1.0, *, growth: float = 2.0, **further: Any) -> None:
        super().__init__(parameters, lr, **further)
        for group in self.param_groups:
            group.update(k=0, weight_sum=0.0, d=1e-6, growth=growth)

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group.update(k=group["k"] + 1, weight_sum=group["weight_sum"] + 1, d=group["d"] * group["growth"])


def test_an_optimizers_own_state_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "DistanceFree", DistanceFree, raising=False)
    assert changes(None, optimizer="DistanceFree") == []
    for name in ("growth", "momentum", "weight_decay"):
        (event,) = changes(
            lambda _, o, name=name: o.param_groups[0].update({name: 0.5}), optimizer="DistanceFree"
        )
        assert (event.kind, event.step, event.data["setting"]) == ("optimizer-changed", AT, name)


def test_of_a_beta_the_part_that_is_forgotten_counts() -> None:
    def of(beta2: float) -> dict[str, float]:
        return numeric_settings(torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0, betas=(0.9, beta2)))

    assert of(0.999) == {"0.beta1": 0.9, "0.beta2": 0.999, "0.eps": 1e-8, "0.weight_decay": 1e-2}
    assert jumps(of(0.95), of(0.96)) == ()
    assert jumps(of(0.999), of(0.99)) == (("beta2", 0.999, 0.99),)
    assert jumps({}, of(0.99)) == ()


def test_a_small_beta2_lets_moments_fall() -> None:
    import numpy as np

    def told(beta2: float) -> list[Any]:
        judge, compared = OutsideChanges(), np.ones((1, 3)) * [0, 1, 1]
        squares = [1.0] * 6 + [0.04]  # the norm falls to a fifth
        return [event for s in squares for event in judge.events(["w"], compared, np.array([s]), (), beta2)]

    assert told(0.1) == []
    assert [kind for kind, _ in told(0.95)] == ["moments-changed"]

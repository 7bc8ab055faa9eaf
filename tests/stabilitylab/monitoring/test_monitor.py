"""The monitor end to end: what arrives in a sink; training stays untouched; nothing stays behind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stabilitylab import Monitor, Schedule
from stabilitylab.telemetry import Event
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording


def train(monitored: bool, steps: int, *, dropout: float = 0.0, clip: float = 1.0, **options: Any) -> GPT:
    torch.manual_seed(1)
    model = GPT(dropout=dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = Monitor(model, optimizer, detector=None, **options) if monitored else None
    for step in range(steps):
        loss = next_token_loss(model, batch(step))
        loss.backward()
        if monitor is not None:
            monitor.gradients_ready()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step(step, loss=loss, gradient_norm=norm, learning_rate=1e-2)
    if monitor is not None:
        monitor.close()
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("every", [1, 3])
def test_training_is_bit_identical_with_and_without(dropout: float, every: int) -> None:
    bare = train(False, 6, dropout=dropout).state_dict()
    watched = train(True, 6, dropout=dropout, every=every, sinks=[Recording()]).state_dict()
    assert all(torch.equal(bare[name], watched[name]) for name in bare)


def test_every_family_arrives_at_its_cadence() -> None:
    sink = Recording()
    train(True, 7, every=3, gradients_every=1, sinks=[sink])
    assert sink.closed
    assert sink.steps("train/-/loss") == list(range(7))
    assert sink.steps("gradient/embedding.weight/l2") == list(range(7))
    assert sink.steps("activation/layers.1/rms") == [0, 3, 6]
    assert sink.steps("activation/layers.0.attention.query_key_value:input/absmax") == [0, 3, 6]
    heads = [(step, i) for step, metric, i in sink.rows if metric == "attention/layers.1.attention/score_max"]
    assert heads == [(step, head) for step in (0, 3, 6) for head in range(4)]


def test_gradients_are_read_before_clipping_and_make_up_the_global_norm() -> None:
    sink = Recording()
    train(True, 2, every=1, clip=1e-3, sinks=[sink])
    squares = [v**2 for (step, name, _), v in sink.rows.items() if step == 1 and name.endswith("/l2")]
    assert math.sqrt(sum(squares)) == pytest.approx(sink.rows[1, "train/-/gradient_norm", -1], rel=1e-5)
    shares = [v for (step, name, _), v in sink.rows.items() if step == 1 and name.endswith("/share")]
    assert sum(shares) == pytest.approx(1.0)


def test_activations_equal_float64() -> None:
    torch.manual_seed(1)
    model, tokens, sink = GPT(), batch(0), Recording()
    seen: dict[str, torch.Tensor] = {}
    model.layers[1].feed_forward[2].register_forward_hook(lambda m, a, y: seen.update(y=y, x=a[0]))
    with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
        next_token_loss(model, tokens).backward()
        monitor.step(0)
    for site, x in (
        ("layers.1.feed_forward.2", seen["y"].detach()),
        ("layers.1.feed_forward.2:input", seen["x"].detach()),
    ):
        x64 = x.double()
        z = x64 - x64.mean()
        expected = {
            "absmax": x64.abs().max(),
            "rms": x64.square().mean().sqrt(),
            "mean": x64.mean(),
            "kurtosis": z.pow(4).mean() / z.square().mean() ** 2,
        }
        for name, value in expected.items():
            # Powers are rounded to float32 (2^-24 each, at most 4 factors); the sums are float64.
            assert sink.rows[0, f"activation/{site}/{name}", -1] == pytest.approx(
                float(value), rel=1e-6, abs=1e-7
            )


def test_nothing_is_left_on_the_model() -> None:
    model = GPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=1, detector=None):
        pass
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_off_steps_have_no_hooks() -> None:
    model = GPT()
    with Monitor(model, every=4, detector=None) as monitor:
        monitor.step(0)
        assert not any(module._forward_hooks for module in model.modules())
        for step in (1, 2, 3):
            monitor.step(step)
        assert any(module._forward_hooks for module in model.modules())


def test_a_step_that_goes_back_is_a_rewind() -> None:
    sink = Recording()
    with Monitor(GPT(), sinks=[sink], detector=None) as monitor:
        for step in (0, 1, 2):
            monitor.step(step, loss=1.0)
        monitor.step(1, loss=2.0)
    assert [(event.kind, event.step) for event in sink.events] == [("rewind", 1)]


class Alarm:
    """A detector that finds a spike in every loss above 10."""

    def update(self, step: int, values: dict[str, float]) -> list[Event]:
        return [Event(step=step, kind="spike")] if values["train/-/loss"] > 10 else []

    def finish(self) -> list[Event]:
        return []

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        pass


def test_everything_is_measured_for_a_while_after_an_alarm() -> None:
    sink, model = Recording(), GPT()
    with Monitor(
        model, schedule=Schedule(every=100, dense_steps=2), sinks=[sink], detector=Alarm()
    ) as monitor:
        for step in range(7):
            next_token_loss(model, batch(step)).backward()
            events = monitor.step(step, loss=20.0 if step == 3 else 1.0)
            assert [event.kind for event in events] == (["spike"] if step == 3 else [])
    assert sink.steps("activation/layers.0/rms") == [0, 4, 5]
    assert [event.step for event in sink.events] == [3]


def test_non_finite_gradients_are_recorded() -> None:
    sink, model = Recording(), nn.Linear(4, 5)
    with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
        model(torch.ones(2, 4)).sum().backward()
        assert model.weight.grad is not None
        model.weight.grad[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
        monitor.step(0)
    assert math.isnan(sink.rows[0, "gradient/weight/absmax", -1])
    assert sink.rows[0, "gradient/weight/nonfinite_fraction", -1] == 3 / 20
    assert np.isfinite(sink.rows[0, "gradient/bias/l2", -1])


class Listening(Alarm):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.heard: dict[int, dict[str, float]] = {}

    def update(self, step: int, values: dict[str, float]) -> list[Event]:
        self.heard[step] = dict(values)
        return []


def test_the_detector_is_given_the_models_extremes() -> None:
    detector, sink, model = Listening(), Recording(), GPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Monitor(model, optimizer, every=2, sinks=[sink], detector=detector) as monitor:
        for step in range(3):
            next_token_loss(model, batch(step)).backward()
            squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step, loss=1.0, learning_rate=0.5)
    count = sum(p.numel() for p in model.parameters())
    largest = max(v for (step, name, _), v in sink.rows.items() if step == 2 and name.endswith("/score_max"))
    assert detector.heard[2]["attention/-/score_max"] == largest
    # Plain SGD: the update over the rate is the gradient. Weights of 3,072 and 4,096 elements are sampled, 256 each.
    assert detector.heard[2]["update/-/rms_over_rate"] == pytest.approx(math.sqrt(squares / count), rel=0.1)
    assert set(detector.heard[1]) == {"train/-/loss", "train/-/learning_rate"}

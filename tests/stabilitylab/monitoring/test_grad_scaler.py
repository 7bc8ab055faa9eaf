"""Under torch's loss scaler: the monitor records numbers without its factor, and sees skipped steps."""

from __future__ import annotations

import math

import pytest
import torch

from stabilitylab import Monitor
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording


@pytest.mark.parametrize("unscale", [False, True])
def test_a_loss_scale_is_taken_out(unscale: bool) -> None:
    rows = []
    for scale in (1.0, 2.0**10):
        torch.manual_seed(0)
        model, sink = GPT(), Recording()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
        with Monitor(model, optimizer, every=1, sinks=[sink], detector=None, scaler=scaler) as monitor:
            for step in range(2):
                scaler.scale(next_token_loss(model, batch(step))).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                monitor.gradients_ready()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                monitor.step(step)
        rows.append(sink.rows)
    for key, value in rows[0].items():
        if not key[1].endswith(("fraction", "headroom_bits")):
            assert rows[1][key] == pytest.approx(value, rel=1e-4, abs=1e-7, nan_ok=True), key
    headroom = "activation_gradient/layers.0/fp16_headroom_bits"
    assert rows[1][0, headroom, -1] == pytest.approx(rows[0][0, headroom, -1] - 10)


def test_a_step_that_the_scaler_skips_is_still_seen() -> None:
    model, sink = GPT(), Recording()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with Monitor(model, optimizer, every=1, sinks=[sink], detector=None, scaler=scaler) as monitor:
        scaler.scale(next_token_loss(model, batch(0)) * math.inf).backward()
        scaler.step(optimizer)
        scaler.update()
        monitor.step(0, skipped=True, loss_scale=2.0)
    assert sink.site(0, "embedding.weight")["nonfinite_fraction"] > 0
    assert sink.rows[0, "precision/-/skipped", -1] == 1
    assert sink.rows[0, "precision/-/loss_scale", -1] == 2
    assert {event.kind for event in sink.events} == {"overflow"}

"""Composer's events in Composer's order, from a loop of our own: its state has these fields, whoever runs it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stabilitylab import load_run
from stabilitylab.integrations.composer import MonitorCallback
from stabilitylab.telemetry import GRADIENT_NORM, LOSS


class Engine:
    """Fires events by name, as Composer's does."""

    def __init__(self, state, callback):
        self.state, self.callback = state, callback

    def run_event(self, name):
        self.callback.run_event(SimpleNamespace(value=name), self.state, None)


def test_losses_norms_and_steps(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = SimpleNamespace(
        model=model,
        optimizers=(optimizer,),
        loss=None,
        scaler=None,
        timestamp=SimpleNamespace(batch=SimpleNamespace(value=0)),
    )
    callback = MonitorCallback(out=tmp_path / "run", every=1, tensorboard=False)
    engine = Engine(state, callback)
    engine.run_event("fit_start")
    losses, norms = [], []
    for _ in range(5):
        engine.run_event("batch_start")
        optimizer.zero_grad()
        seen = []
        for _ in range(2):
            engine.run_event("before_loss")
            state.loss = model(torch.randn(8, 4)).square().mean()
            engine.run_event("after_loss")
            (state.loss / 2).backward()
            engine.run_event("after_backward")
            seen.append(state.loss.item())
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
        engine.run_event("after_train_batch")
        optimizer.step()
        state.timestamp.batch.value += 1
        engine.run_event("batch_end")
        losses.append(sum(seen) / 2)
    engine.run_event("fit_end")
    assert callback.monitor is None
    run = load_run(tmp_path / "run")
    assert run.series(LOSS).index.tolist() == [0, 1, 2, 3, 4]
    assert run.series(LOSS).tolist() == pytest.approx(losses)
    assert run.series(GRADIENT_NORM).tolist() == pytest.approx(norms)
    assert run.matrix("gradient", "l2").pow(2).sum().pow(0.5).tolist() == pytest.approx(norms, rel=1e-5)

"""Composer's events in Composer's order, from a loop of our own whose state has Composer's fields."""

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


def test_composers_own_trainer(tmp_path):
    """Loss and norm before clipping of each batch, computed beside it in one pass over the whole batch."""
    composer = pytest.importorskip("composer")
    from composer.algorithms import GradientClipping

    class Model(composer.ComposerModel):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))

        def forward(self, batch):
            return self.net(batch[0])

        def loss(self, outputs, batch):
            return (outputs - batch[1]).square().mean()

    class Beside(composer.Callback):
        def __init__(self):
            self.told = []

        def batch_start(self, state, logger):
            loss = state.model.loss(state.model(state.batch), state.batch)
            gradients = torch.autograd.grad(loss, list(state.model.parameters()))
            self.told.append((loss.item(), nn.utils.get_total_norm(gradients).item()))

    torch.manual_seed(0)
    x = torch.randn(64, 4)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    model, beside = Model(), Beside()
    composer.Trainer(
        model=model,
        train_dataloader=torch.utils.data.DataLoader(data, batch_size=8),
        optimizers=torch.optim.AdamW(model.parameters(), 1e-2),
        max_duration="8ba",
        device="cpu",
        device_train_microbatch_size=4,
        algorithms=[GradientClipping("norm", 0.05)],
        callbacks=[MonitorCallback(out=tmp_path / "run", every=1, tensorboard=False), beside],
        progress_bar=False,
    ).fit()
    run = load_run(tmp_path / "run")
    assert run.series(LOSS).index.tolist() == list(range(8))
    assert run.series(LOSS).tolist() == pytest.approx([loss for loss, _ in beside.told], rel=1e-5)
    assert run.series(GRADIENT_NORM).tolist() == pytest.approx([norm for _, norm in beside.told], rel=1e-5)

"""Under the real Lightning Trainer: its steps, its losses, gradients before it clips; training unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.stabilitylab.gpt import GPT, next_token_loss
from tests.stabilitylab.recording import Recording

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


@pytest.fixture(scope="module")
def lightning() -> Any:
    """Imported here, where it is used: it takes two seconds, which a process that runs other tests need not spend."""
    return pytest.importorskip("lightning.pytorch")


def module_of(lightning: Any) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT()
            self.norms: list[float] = []
            self.losses: list[float] = []

        def training_step(self, tokens: Tensor, index: int) -> Tensor:
            loss = next_token_loss(self.model, tokens)
            self.losses.append(loss.item())
            return loss

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            norms = torch._foreach_norm([p.grad for p in self.parameters() if p.grad is not None])
            self.norms.append(torch.stack(norms).norm().item())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Module()


def fit(lightning: Any, folder: Path, sink: Recording | None, accumulation: int) -> Any:
    lightning.seed_everything(0, verbose=False)
    from stabilitylab.integrations.lightning import MonitorCallback

    module = module_of(lightning)
    tokens = torch.randint(64, (32, 17), generator=torch.Generator().manual_seed(0))
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.01,
        accumulate_grad_batches=accumulation,
        default_root_dir=folder,
        callbacks=[MonitorCallback(every=1, sinks=[sink], detector=None)] if sink is not None else [],
    )
    trainer.fit(module, torch.utils.data.DataLoader(tokens, batch_size=4))
    return module


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_losses_and_gradients_are_the_trainers(
    lightning: Any, tmp_path: Path, accumulation: int
) -> None:
    sink = Recording()
    module, bare = fit(lightning, tmp_path, sink, accumulation), fit(lightning, tmp_path, None, accumulation)
    for name, value in bare.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    assert sink.steps("train/-/loss") == [0, 1, 2]
    for step, norm in enumerate(module.norms):
        assert sink.rows[step, "train/-/gradient_norm", -1] == pytest.approx(norm, rel=1e-5)
        losses = module.losses[step * accumulation : (step + 1) * accumulation]
        assert sink.rows[step, "train/-/loss", -1] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert [sink.rows[step, "train/-/learning_rate", -1] for step in range(3)] == [1e-2, 5e-3, 2.5e-3]
    assert sink.rows[2, "activation/model.layers.1/rms", -1] > 0
    assert sink.vector(2, "attention/model.layers.1.attention/score_max")
    assert sink.closed

"""Under the real Trainer: its steps, its losses, gradients before it clips; training unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from stabilitylab.integrations.transformers import MonitorCallback  # noqa: E402
from stabilitylab.runs import load_run  # noqa: E402
from tests.stabilitylab.recording import Recording  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


def train(folder: Path, *, sink: Recording | None, steps: int = 3, **arguments: Any) -> Any:
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(64, (32, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            max_grad_norm=0.01,
            **arguments,
        ),
        optimizers=(optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[MonitorCallback(every=1, sinks=[sink], detector=None)] if sink is not None else [],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_losses_and_gradients_are_the_trainers(tmp_path: Path, accumulation: int) -> None:
    clip, sink = torch.nn.utils.clip_grad_norm_, Recording()
    trainer = train(tmp_path, sink=sink, gradient_accumulation_steps=accumulation)
    bare = train(tmp_path, sink=None, gradient_accumulation_steps=accumulation)
    for name, value in bare.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert sink.steps("train/-/loss") == [0, 1, 2]
    for step, entry in enumerate(logs):
        # The Trainer rounds what it logs to a few digits.
        assert sink.rows[step, "train/-/loss", -1] == pytest.approx(entry["loss"], rel=1e-3)
        assert sink.rows[step, "train/-/gradient_norm", -1] == pytest.approx(
            float(entry["grad_norm"]), rel=1e-3
        )
        squares = [v**2 for (s, name, _), v in sink.rows.items() if s == step and name.endswith("/l2")]
        assert sum(squares) ** 0.5 == pytest.approx(float(entry["grad_norm"]), rel=1e-3)
    assert [sink.rows[step, "train/-/learning_rate", -1] for step in range(3)] == [1.0, 0.5, 0.25]
    assert sink.vector(2, "attention/model.layers.1.self_attn/score_max")
    assert sink.rows[0, "activation/model.layers.0.input_layernorm/rms", -1] > 0
    assert torch.nn.utils.clip_grad_norm_ is clip
    assert sink.closed


class Interruption(transformers.TrainerCallback):  # type: ignore[misc]
    """Ctrl-C before a step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(x).squeeze(-1) - labels).square().mean()}


@pytest.mark.parametrize("resumed", [False, True])
def test_training_that_was_interrupted_and_begun_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, resumed: bool
) -> None:
    clip, run, interruption = torch.nn.utils.clip_grad_norm_, tmp_path / "run", Interruption(5)
    trainer = transformers.Trainer(
        Tiny(),
        transformers.TrainingArguments(
            str(tmp_path / "out"),
            max_steps=8,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_steps=3,
        ),
        train_dataset=[{"x": torch.ones(4), "labels": torch.tensor(0.0)}] * 32,
        callbacks=[MonitorCallback(out=run, every=2, tensorboard=False), interruption],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    interruption.step = None
    trainer.train(resume_from_checkpoint=resumed)
    assert torch.nn.utils.clip_grad_norm_ is clip
    assert not trainer.model._forward_hooks
    first = load_run(run)
    if resumed:
        assert list(first.series("train/-/loss").index) == list(range(8))
        assert [(e.kind, e.step) for e in first.events if e.kind == "rewind"] == [("rewind", 3)]
        assert not (tmp_path / "run-2").exists()
    else:
        assert list(first.series("train/-/loss").index) == list(range(5))
        assert list(load_run(tmp_path / "run-2").series("train/-/loss").index) == list(range(8))
        assert "holds a run already" in caplog.text

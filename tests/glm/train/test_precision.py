"""What a run records about its number formats, against counts from the gradients themselves."""

from __future__ import annotations

import dataclasses

import pytest

from glm.data.loader import Loader
from glm.model.config import ModelConfig
from glm.precision import gradient_range
from glm.train.config import BatchConfig, CheckpointConfig, MonitorConfig, TrainConfig
from glm.train.engine import LocalEngine
from glm.train.events import Callback
from glm.train.loop import Trainer
from glm.train.monitoring import MonitorCallback
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder

CONFIG = TrainConfig(
    steps=3,
    model=ModelConfig(vocabulary=1000, layers=1, hidden=32, heads=2, length=64),
    batch=BatchConfig(rows=4, micro_rows=2),
    monitor=MonitorConfig(every=2, tensorboard=False),
    checkpoint=CheckpointConfig(every=0, ring=0),
)


class Look(Callback):
    """Counts independently, from the model's gradients while they exist."""

    def __init__(self, trained):
        self.trained, self.seen = trained, []

    def gradients_ready(self, step, gradients):
        model = self.trained.engine.model
        left = [p.grad for p in model.parameters() if p.grad is not None]
        self.seen.append(gradient_range(left or gradients.gradients.values()))


def run(config, data, path):
    loader = Loader(data, config.objective, config.sampling, length=64, seed=0)
    folder = RunFolder(path)
    folder.claim()
    trained = Trainer(config, LocalEngine(config), loader, run=folder)
    look = Look(trained)
    trained.callbacks = (look, MonitorCallback(folder, config.monitor))
    trained.train()
    folder.release()
    return load_run(path), look.seen


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradient_elements_are_counted_at_the_monitors_cadence(data, tmp_path, precision):
    # So small a loss scale that much of fp16's gradient falls below its range.
    scale = dataclasses.replace(CONFIG.loss_scale, initial=2.0**-8, minimum=2.0**-10)
    config = dataclasses.replace(CONFIG, precision=precision)
    if precision == "fp16":
        config = dataclasses.replace(config, loss_scale=scale)
    recorded, seen = run(config, data, tmp_path / "run")
    for statistic, field in (
        ("gradient_elements", "elements"),
        ("overflowed_elements", "nonfinite"),
        ("zero_elements", "zero"),
        ("subnormal_elements", "subnormal"),
    ):
        series = recorded.series(f"precision/-/{statistic}")
        assert series.to_dict() == {step: getattr(seen[step], field) for step in (0, 2)}
    assert seen[0].elements == CONFIG.model.parameters()
    if precision == "fp16":
        assert seen[0].subnormal > seen[0].elements / 10


def test_the_first_updates_rms_t_is_one(data, tmp_path):
    """v is free of its bias only if the instrument knows beta2 and the step: then v = g^2 after the first update."""
    recorded, _ = run(CONFIG, data, tmp_path / "run")
    for site in (
        "layers.0.attention.output.weight",
        "layers.0.feed_forward.down.weight",
        "final_norm.weight",
    ):
        # Every element has a gradient; those below epsilon, 1e-8, would lower it.
        assert recorded.series(f"update/{site}/rms_t").loc[0] == pytest.approx(1.0, abs=1e-3)

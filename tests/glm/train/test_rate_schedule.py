"""Schedules against their closed forms at every step; what a resumed run records is what an unbroken one would."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glm.data.config import DataConfig
from glm.data.loader import Loader
from glm.errors import InputError
from glm.model.config import EmbeddingConfig, ModelConfig
from glm.train import checkpoint as checkpoints
from glm.train.config import BatchConfig, CheckpointConfig, MonitorConfig, TrainConfig
from glm.train.engine import LocalEngine
from glm.train.loop import Trainer
from glm.train.monitoring import MonitorCallback
from glm.train.rate_schedule import ScheduleConfig
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.telemetry import Event


def test_warm_up_and_cosine_are_glm_130bs():
    """Table 11: 8e-5 to 8e-6, cosine, warm-up over 0.5 %."""
    schedule = ScheduleConfig(peak=8e-5, least=0.1, warmup=50)
    rates = np.array([schedule.learning_rate(step, 10_000) for step in range(10_000)])
    np.testing.assert_allclose(rates[:50], 8e-5 * np.arange(1, 51) / 50, rtol=1e-12)
    x = np.arange(9950) / 9950
    np.testing.assert_allclose(rates[50:], 8e-6 + (8e-5 - 8e-6) * (1 + np.cos(math.pi * x)) / 2, rtol=1e-12)
    assert schedule.learning_rate(10_000, 10_000) == pytest.approx(8e-6)
    assert schedule.learning_rate(20_000, 10_000) == pytest.approx(8e-6)


def test_wsd_holds_the_peak_and_then_cools_down():
    schedule = ScheduleConfig(peak=2.0, least=0.1, warmup=10, shape="wsd", decay_share=0.25)
    rates = np.array([schedule.learning_rate(step, 200) for step in range(201)])
    np.testing.assert_allclose(rates[10:151], 2.0, rtol=1e-12)
    x = np.arange(51) / 50
    np.testing.assert_allclose(rates[150:], 0.2 + 1.8 * (1 - np.sqrt(x)), rtol=1e-12)
    # A warm-up longer than what is held leaves the rest to the decay.
    late = ScheduleConfig(peak=1.0, least=0.0, warmup=90, shape="wsd", decay_share=0.5)
    assert late.learning_rate(89, 100) == late.learning_rate(90, 100) == 1.0
    assert late.learning_rate(100, 100) == pytest.approx(0.0)
    with pytest.raises(InputError, match="decay_share"):
        ScheduleConfig(decay_share=0.0)


def test_inverse_square_root():
    schedule = ScheduleConfig(peak=3.0, least=0.01, warmup=16, shape="inverse-sqrt")
    rates = np.array([schedule.learning_rate(step, 10**6) for step in range(3000)])
    np.testing.assert_allclose(rates[16:], 3.0 * np.sqrt(16 / np.arange(17, 3001)), rtol=1e-12)
    assert schedule.learning_rate(10**6, 10**7) == pytest.approx(0.03)


@pytest.mark.parametrize("shape", ["linear", "constant"])
def test_other_shapes(shape):
    schedule = ScheduleConfig(peak=2.0, least=0.5, warmup=4, shape=shape, decay_steps=14)
    rates = [schedule.learning_rate(step, 1000) for step in range(20)]
    after = [2.0 - (min(step, 14) - 4) / 10 for step in range(4, 20)] if shape == "linear" else [2.0] * 16
    np.testing.assert_allclose(rates, [0.5, 1.0, 1.5, 2.0, *after], rtol=1e-12)


def test_alpha_rises_between_two_steps():
    schedule = ScheduleConfig(shrink_to=1.0, shrink_from_step=6000, shrink_to_step=6500)
    alphas = [schedule.embedding_gradient_shrink(step, 0.1) for step in (0, 6000, 6250, 6500, 9000)]
    np.testing.assert_allclose(alphas, [0.1, 0.1, 0.55, 1.0, 1.0], rtol=1e-12)
    assert ScheduleConfig().embedding_gradient_shrink(5, 0.3) == 0.3


@pytest.mark.parametrize(
    "wrong",
    [
        {"peak": 0.0},
        {"least": 1.5},
        {"warmup": -1},
        {"shrink_to": 2.0},
        {"shrink_to": 1.0, "shrink_from_step": 5, "shrink_to_step": 4},
    ],
)
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(InputError, match=r"schedule\."):
        ScheduleConfig(**wrong)


def test_ramps_are_recorded_and_resumed(data, tmp_path):
    """A resumed run records rate, EGS's alpha, rows of an update and data mixture as the schedules say for one run."""
    config = TrainConfig(
        steps=8,
        model=ModelConfig(
            vocabulary=1000,
            layers=1,
            hidden=16,
            heads=2,
            length=64,
            embedding=EmbeddingConfig(gradient_shrink=0.1),
        ),
        batch=BatchConfig(rows=6, micro_rows=1, ramp_from=2, ramp_samples=16),
        schedule=ScheduleConfig(peak=1e-2, warmup=3, shrink_to=1.0, shrink_from_step=2, shrink_to_step=6),
        sampling=DataConfig(
            mixture=(("zh", 1.0), ("pydoc", 1.0)), mixture_before=(("zh", 1.0),), mixture_ramp=(0, 20)
        ),
        monitor=MonitorConfig(every=0, gradients_every=0, tensorboard=False),
        checkpoint=CheckpointConfig(every=0, ring=0),
    )

    def trainer(run):
        loader = Loader(data, config.objective, config.sampling, length=64, seed=0)
        return Trainer(
            config, LocalEngine(config), loader, run=run, callbacks=(MonitorCallback(run, config.monitor),)
        )

    run = RunFolder(tmp_path / "run")
    run.claim()
    assert not trainer(run).train(until=3)
    second = trainer(run)
    second.restore(checkpoints.load_newest(run.checkpoints)[0])
    second.tell(Event(step=second.step, kind="rewind"))
    assert second.train()
    run.release()
    recorded = load_run(run.path)
    rates = [config.schedule.learning_rate(step, 8) for step in range(8)]
    alphas = [config.schedule.embedding_gradient_shrink(step, 0.1) for step in range(8)]
    rows, samples = [], 0
    for _ in range(8):
        rows.append(config.batch.rows_at(samples))
        samples += rows[-1]
    zh = [1 - 0.5 * min(1.0, sum(rows[:step]) / 20) for step in range(8)]
    assert rows == [2, 2, 3, 3, 4, 5, 6, 6]
    for metric, expected in (
        ("learning_rate", rates),
        ("embedding_gradient_shrink", alphas),
        ("tokens", [64 * n for n in rows]),
        ("mixture of zh", zh),
        ("mixture of pydoc", [1 - share for share in zh]),
    ):
        component = metric.removeprefix("mixture of ")
        name = f"train/-/{metric}" if component == metric else f"train/{component}/mixture_share"
        series = recorded.series(name)
        assert list(series.index) == list(range(8))
        np.testing.assert_allclose(series.to_numpy(), expected, rtol=1e-12)

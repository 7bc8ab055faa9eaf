"""The metrics of experiments, from run folders with known numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments import metrics
from experiments.metrics import METRICS
from stabilitylab.runs import Run, load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks import ParquetSink
from stabilitylab.telemetry import Event, Key, Samples

STEPS = 20
LOSS = Key("train", "-", "loss")
NORM = Key("train", "-", "gradient_norm")
SKIPPED = Key("train", "-", "skipped")
LAYERS = tuple(Key("activation", f"layers.{i}", "absmax") for i in (0, 1, 10))  # 10 after 1, not before 2


def recorded(folder: Path, values: dict[Key, list[float]]) -> Run:
    run = RunFolder(folder)
    folder.mkdir()
    run.config.write_text(json.dumps({"schedule": {"warmup": 10}}))
    rows = [(step, key, series[step]) for key, series in values.items() for step in range(len(series))]
    sink = ParquetSink(run.telemetry)
    sink.write(Samples.of(rows), [])
    sink.close()
    return load_run(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    steps = range(STEPS)
    return recorded(
        tmp_path_factory.mktemp("metrics") / "run",
        {
            LOSS: [10.0 - 0.25 * step for step in steps],
            # Large in warm-up, not finite once after it.
            NORM: [100.0 if step < 10 else math.inf if step == 12 else 1.0 + step % 2 for step in steps],
            SKIPPED: [float(step == 12) for step in steps],
            LAYERS[0]: [2.0] * STEPS,
            LAYERS[1]: [3.0] * STEPS,
            LAYERS[2]: [float(step) for step in steps],
        },
    )


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("final_loss", 5.375),  # steps 18 and 19
        ("gradient_norm_max", 2.0),
        ("skipped_steps", 1.0),
        ("residual_stream_max", 19.0),
        ("residual_stream_growth", 9.5),
        ("gradient_norm_spread", float(np.std([0.0, math.log(2)] * 4 + [math.log(2)], ddof=1))),
        ("fp16_headroom", math.log2(65504 / 19)),
    ],
)
def test_value(run: Run, metric: str, expected: float) -> None:
    assert METRICS[metric].measure(run) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("metric", ["embedding_share", "attention_score_max", "outlier_fraction"])
def test_absent_telemetry_is_nan(run: Run, metric: str) -> None:
    assert math.isnan(METRICS[metric].measure(run))


def test_a_run_that_left_the_numbers_is_worse_than_any(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", {LOSS: [1.0] * 19 + [math.nan], LAYERS[0]: [math.inf] * STEPS})
    assert METRICS["final_loss"].measure(run) == math.inf
    assert METRICS["fp16_headroom"].measure(run) == -math.inf


@pytest.mark.parametrize("broken", [9.0, math.inf, math.nan])
def test_what_breaks_first(tmp_path: Path, broken: float) -> None:
    """The norm passes four times its median at step 70 (before there is a median nothing counts), the loss at step 75."""
    share = Key("gradient", "embedding.weight", "share")
    values = {
        LOSS: [2.0] * 100,
        NORM: [50.0] + [2.0] * 69 + [broken] * 30,
        share: [0.5] * 70 + [0.75] * 30,
    }
    folder = tmp_path / "run"
    run = recorded(folder, values)
    assert math.isnan(METRICS["norm_lead"].measure(run))
    assert METRICS["embedding_surge"].measure(run) == 0.25
    assert METRICS["survived"].measure(run) == 100
    told = {"episode": 0, "phase": "onset", "onset": 75, "peak": 76, "end": None, "height": 3.0}
    RunFolder(folder).append_events(
        [
            Event(
                step=8, kind="hard-batch", data={**told, "signal": "train/-/loss", "episode": 1, "onset": 8}
            ),
            Event(
                step=60,
                kind="spike",
                data={**told, "signal": "train/-/gradient_norm", "episode": 2, "onset": 60},
            ),
            Event(step=75, kind="divergence", data={**told, "signal": "train/-/loss"}),
        ]
    )
    assert METRICS["norm_lead"].measure(load_run(folder)) == 5.0
    assert METRICS["survived"].measure(load_run(folder)) == 75


def test_an_overflow_that_the_scaler_catches_breaks_nothing(tmp_path: Path) -> None:
    norm = [2.0] * 40 + [math.inf] + [2.0] * 29 + [9.0] * 30
    skipped = Key("train", "-", "skipped")
    share = Key("gradient", "embedding.weight", "share")
    values = {
        LOSS: [2.0] * 100,
        NORM: norm,
        skipped: [float(step == 40) for step in range(100)],
        share: [0.5] * 70,
    }
    run = recorded(tmp_path / "run", values)
    assert metrics._norm_breaks(run) == 70
    assert math.isnan(METRICS["embedding_surge"].measure(run))

"""A run folder whose events are known: samples written by hand, episodes from the real detector."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks import ParquetSink, TensorBoardSink
from stabilitylab.spikes import SpikeDetector
from stabilitylab.telemetry import Event, Key, Samples

LAYERS, HEADS = 4, 3
SPIKE, BROKEN = 60, 90  # where the loss jumps, and where the gradient of layer 2 is NaN
KEYS = (
    Key("train", "-", "loss"),
    Key("train", "-", "gradient_norm"),
    Key("train", "-", "learning_rate"),
    Key("precision", "-", "loss_scale"),
    Key("gradient", "embedding.weight", "l2"),
    Key("gradient", "embedding.weight", "share"),
    *(Key("gradient", f"layers.{i}.attention.output.weight", "l2") for i in range(LAYERS)),
    *(Key("gradient", f"layers.{i}.feed_forward.up.weight", "l2") for i in range(LAYERS)),
    *(Key("activation", f"layers.{i}", "absmax") for i in range(LAYERS)),
    *(Key("activation", f"layers.{i}", "outlier_fraction") for i in range(LAYERS)),
    *(Key("update", f"layers.{i}.attention.output.weight", "ratio") for i in range(LAYERS)),
    *(
        Key("attention", f"layers.{i}.attention", "score_max", head)
        for i in range(LAYERS)
        for head in range(HEADS)
    ),
)
NUMBER = {key: i for i, key in enumerate(KEYS)}
DEAR = frozenset({"activation", "attention", "update"})  # measured every tenth step


def values_at(step: int, dice: np.random.Generator) -> dict[Key, float]:
    """The run's numbers: the loss falls, layers grow with depth, and two things happen."""
    jump = 3.0 * math.exp(-(step - SPIKE) / 4) if step >= SPIKE else 0.0
    base: dict[str, float] = {
        "loss": 3.0 + 4.0 * math.exp(-step / 20) + jump + dice.normal() * 0.03,
        "gradient_norm": (1.0 + 5.0 * jump) * math.exp(dice.normal() * 0.1),
        "learning_rate": 1e-3 * min(1.0, (step + 1) / 20),
        "loss_scale": 65536.0 / (4 if step > BROKEN else 1),
    }
    found: dict[Key, float] = {}
    for key in KEYS:
        if key.family in DEAR and step % 10:
            continue
        depth = 1.0 + int(key.site.split(".")[1]) if key.site.startswith("layers.") else 1.0
        if key.statistic in base:
            found[key] = base[key.statistic]
        elif key.statistic in ("share", "outlier_fraction", "ratio"):
            found[key] = {"share": 0.6, "outlier_fraction": 0.01 * depth, "ratio": 0.001 * depth}[
                key.statistic
            ]
        else:
            found[key] = depth * (2.0 + step / 20) * (1.0 + 0.1 * max(key.index, 0))
    if step == BROKEN:
        found[Key("gradient", "layers.2.feed_forward.up.weight", "l2")] = math.nan
        found[Key("train", "-", "gradient_norm")] = math.inf
    return found


def flushes(steps: int, seed: int = 0, every: int = 10) -> Iterator[tuple[Samples, list[Event]]]:
    """The flushes that a monitor would hand to its sinks."""
    dice = np.random.default_rng(seed)
    detector = SpikeDetector()
    rows: list[tuple[int, Key, float]] = []
    events = [Event(step=0, kind="run-start", data={"torch": "2"})]
    for step in range(steps):
        values = values_at(step, dice)
        rows += [(step, key, value) for key, value in values.items()]
        judged = {key.metric: value for key, value in values.items() if key.family in ("train", "precision")}
        events += detector.update(step, judged)
        if (step + 1) % every == 0 or step + 1 == steps:
            if step + 1 == steps:
                events += [*detector.finish(), Event(step=step, kind="run-end")]
            number = np.array([NUMBER[key] for _, key, _ in rows], dtype=np.int32)
            yield (
                Samples(KEYS, np.array([row[0] for row in rows]), number, np.array([row[2] for row in rows])),
                events,
            )
            rows, events = [], []


def make_run(
    path: Path, *, steps: int = 120, seed: int = 0, tensorboard: bool = False, config: Any = None
) -> Path:
    """Write the run folder as a monitored training would."""
    path.mkdir(parents=True)
    config = (
        {"preset": "glm-tiny", "seed": seed, "model": {"layers": LAYERS, "norm": "pre"}}
        if config is None
        else config
    )
    (path / "config.json").write_text(json.dumps(config))
    run = RunFolder(path)
    sinks = [ParquetSink(run.telemetry), *([TensorBoardSink(run.tensorboard)] if tensorboard else [])]
    for samples, events in flushes(steps, seed):
        run.append_events(events)
        for sink in sinks:
            sink.write(samples, events)
    for sink in sinks:
        sink.close()
    return path

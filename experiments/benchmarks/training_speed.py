"""Where a training step's time goes: data, forward and backward, gradients, update, monitor; and tokens a second.

The parts are timed inside whole steps of the real engine on real rows; the monitor's share is the difference between steps with
and without it, taken in turn so that a drifting machine moves both. Medians over the steps.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from experiments.data import bilingual
from glm.data.loader import Loader
from glm.data.shards import open_data
from glm.train.commands import preset_config, with_vocabulary
from glm.train.config import TrainConfig
from glm.train.engine import LocalEngine
from stabilitylab import Monitor
from stabilitylab.command_line import parse


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Time the parts of a training step.

    Attributes:
        preset: of `glm train`.
        precision: compute format.
        rows: rows an update.
        steps: steps timed, each with and without the monitor.
        threads: of torch.
        every: the monitor's cadence.
        data: folder made by `glm shards`; by default the quick suite's.
        json: print one JSON object.
    """

    preset: str = "glm-tiny"
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    rows: int = 4
    steps: int = 30
    threads: int = 1
    every: int = 10
    data: Path | None = None
    json: bool = False


PARTS = ("data", "forward and backward", "gradients", "update")


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code."""
    settings: Settings = parse(Settings, arguments, program="python -m experiments.benchmarks training_speed")
    torch.set_num_threads(settings.threads)
    result = measure(settings)
    if settings.json:
        print(json.dumps(result))
        return 0
    table = Table(
        "part",
        "ms, median",
        "share",
        title=f"{settings.preset}, {settings.precision}, {settings.threads} thread",
    )
    for part in PARTS:
        table.add_row(part, f"{result['ms'][part]:.1f}", f"{result['share'][part]:.1%}")
    table.add_row("whole step, no monitor", f"{result['ms']['step']:.1f}", "100%")
    table.add_row(f"whole step, monitor every {settings.every}", f"{result['ms']['monitored step']:.1f}", "")
    console = Console()
    console.print(table)
    console.print(
        f"{result['tokens_per_second']:,.0f} tokens/s; the monitor adds {result['monitor_overhead']:+.1%} to the mean step"
    )
    return 0


def measure(settings: Settings) -> dict[str, object]:
    """Median milliseconds of each part, their shares, tokens a second, the monitor's overhead."""
    data = open_data(settings.data or bilingual(Path("data") / "bilingual"))
    config = with_vocabulary(preset_config(settings.preset), data)
    config = dataclasses.replace(
        config, precision=settings.precision, batch=dataclasses.replace(config.batch, rows=settings.rows)
    )
    loader = Loader(data, config.objective, config.sampling, length=config.model.length, seed=0)
    bare, watched = LocalEngine(config), LocalEngine(config)
    times: dict[str, list[float]] = {part: [] for part in (*PARTS, "step", "monitored step")}
    with TemporaryDirectory() as folder:
        monitor = Monitor(
            watched.model,
            watched.optimizer,
            parameters=watched.tensors()[0],
            out=Path(folder) / "run",
            every=settings.every,
            gradients_every=1,
        )
        with monitor:
            for step in range(-3, settings.steps):
                parts = timed_step(config, bare, loader, step + 3, None)
                monitored = sum(timed_step(config, watched, loader, step + 3, monitor).values())
                if step >= 0:  # the first steps allocate
                    for part, seconds in parts.items():
                        times[part].append(seconds)
                    times["step"].append(sum(parts.values()))
                    times["monitored step"].append(monitored)
    ms = {part: 1e3 * statistics.median(seconds) for part, seconds in times.items()}
    return {
        "settings": {k: str(v) for k, v in dataclasses.asdict(settings).items()},
        "ms": ms,
        "share": {part: ms[part] / sum(ms[p] for p in PARTS) for part in PARTS},
        "tokens_per_second": settings.rows * config.model.length / (ms["step"] / 1e3),
        # Means: a monitor that measures each tenth step would not show in a median at all.
        "monitor_overhead": statistics.fmean(times["monitored step"]) / statistics.fmean(times["step"]) - 1,
    }


def timed_step(
    config: TrainConfig, engine: LocalEngine, loader: Loader, step: int, monitor: Monitor | None
) -> dict[str, float]:
    """One step as the training loop makes it; seconds of each part, the monitor's work inside the parts it interrupts."""
    marks = [time.perf_counter()]
    batch = loader.batch(step, config.batch.rows)
    marks.append(time.perf_counter())
    loss = engine.forward_backward(batch, step)
    marks.append(time.perf_counter())
    summary = engine.gradients()
    if monitor is not None:
        monitor.gradients_ready(gradients=summary.gradients, norms=summary.norms)
    marks.append(time.perf_counter())
    engine.update(config.schedule.learning_rate(step, config.steps), clip=config.optimizer.clip)
    if monitor is not None:
        monitor.step(step, loss=loss, gradient_norm=summary.global_norm)
    marks.append(time.perf_counter())
    return dict(zip(PARTS, (b - a for a, b in pairwise(marks)), strict=True))

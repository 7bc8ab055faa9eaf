"""What telemetry costs a training of several processes, beside its cost in one process.

One world of processes after the other trains the same model on the same batches: one process with the local engine, and tensor 2 x
pipeline 2 with the parallel one. In each, bare and watched turns of ``steps`` steps alternate:

    bare, watched, bare again, watched, ...

all in the same processes, on one engine, so that a slow process or moment affects both: a turn's ratio is its time over the mean of
the bare turns before and after it. The control does the same with every second bare turn as if it were watched, and so shows the
error of the measurement. Watching measures everything every tenth step and gradients every step, with the run folder's sinks except
TensorBoard's, which draws its pictures in a separate process.

*Wall* is the slowest rank's time from a barrier to a barrier; *processor* the time of all threads of all ranks. In the local run
the writer's thread has its own core, with four processes on two cores it has none: compare the processor ratio. Medians over the
turns, 95 % intervals by bootstrap. *Collectives* are the monitor's calls of ``torch.distributed`` per turn, and the bytes of one
rank's packet.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from experiments.benchmarks._presets import preset
from experiments.benchmarks._worlds import batch, import_all, in_world
from experiments.statistics import median_interval
from glm.distributed.config import ParallelConfig
from glm.train.config import BatchConfig, TrainConfig
from glm.train.engine import Engine, LocalEngine
from stabilitylab import Monitor, Schedule
from stabilitylab.command_line import parse
from stabilitylab.monitoring.rank_gather import RankGather

WORLDS = {"local": (1, 1, 1), "2x2": (2, 2, 1)}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Telemetry's cost under 2 x 2 beside the local one.

    Attributes:
        preset: a preset of `glm train`.
        vocabulary: vocabulary size, where the preset leaves it open.
        rows: rows of an update.
        micro_rows: rows of a micro-batch.
        turns: turns of watched steps, in each world.
        steps: steps of a turn; a multiple of 10.
        json: print one JSON object.
    """

    preset: str = "glm-tiny"
    vocabulary: int = 4096
    rows: int = 4
    micro_rows: int = 1
    turns: int = 10
    steps: int = 10
    json: bool = False


class Switched(Schedule):
    """A cadence that one can switch off: then there are no hooks."""

    on = True

    def due(self, probe: str, step: int, last_event: int | None = None) -> bool:
        return self.on and super().due(probe, step, last_event)


def main(argv: Sequence[str]) -> int:
    settings: Settings = parse(Settings, argv, program="python -m experiments.benchmarks telemetry_overhead")
    torch.set_num_threads(1)
    import_all()
    found = {name: summary(_world(settings, axes)) for name, axes in WORLDS.items()}
    if settings.json:
        print(json.dumps({"settings": dataclasses.asdict(settings), "worlds": found}))
    else:
        Console().print(_table(found))
    return 0


def _world(settings: Settings, axes: tuple[int, int, int]) -> list[dict[str, object]]:
    """The result of ``_turns`` on each rank."""
    t, p, d = axes
    rows = BatchConfig(rows=settings.rows, micro_rows=settings.micro_rows)
    parallel = ParallelConfig(tensor=t, pipeline=p, data=d)
    config = preset(settings.preset, settings.vocabulary, batch=rows, parallel=parallel)
    return in_world(parallel, lambda: _turns(settings, config))


def _turns(settings: Settings, config: TrainConfig) -> dict[str, object]:
    """[turns, 2] seconds on the wall and of the processor; the collectives of a watched turn; bytes of a packet."""
    from glm.parallel.engine import ParallelEngine

    torch.set_num_threads(1)
    engine: Engine = ParallelEngine(config) if config.parallel.ranks > 1 else LocalEngine(config)
    schedule = Switched(every=10, probes={"gradients": 1})
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(
            engine.model,
            engine.optimizer,
            out=folder + "/run",
            parameters=engine.tensors()[0],
            schedule=schedule,
            detector=None,
            tensorboard=False,
            sharded=engine.sharded,
            scattered=engine.scattered,
            shard=engine.shard,
        )
        calls = _count_collectives()
        taken, counted = [], []
        for turn in range(-3, 2 * settings.turns + 1):
            watched = turn % 2 == 1
            object.__setattr__(schedule, "on", watched)
            began = turn * settings.steps + 3 * settings.steps
            # A step number that it does not expect, so that it checks its schedule again.
            monitor.start_step(began if watched else began + 1)
            calls.clear()
            _meet()
            wall, processor = time.perf_counter(), time.process_time()
            for step in range(began, began + settings.steps):
                _step(engine, config, step, monitor if watched else None)
            _meet()
            if turn >= 0:
                taken.append((time.perf_counter() - wall, time.process_time() - processor))
                if watched:
                    counted.append(dict(calls))
        size = sum(part.numel() for part in monitor._buffer.parts())
        monitor.close()
    return {"taken": taken, "calls": counted[-1], "bytes": size}


def _step(engine: Engine, config: TrainConfig, step: int, monitor: Monitor | None) -> None:
    began = time.perf_counter()
    rows = batch(config.model, config.batch.rows, step)
    loss = engine.forward_backward(rows, step)
    gradients = engine.gradients()
    if monitor is not None:
        monitor.gradients_ready(gradients=gradients.gradients, norms=gradients.norms)
    engine.update(1e-4, clip=1.0)
    if monitor is not None:
        seconds = time.perf_counter() - began
        monitor.step(
            step, loss=loss, gradient_norm=gradients.global_norm, learning_rate=1e-4, seconds=seconds
        )


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def _count_collectives() -> Counter[str]:
    """Count the monitor's calls from now on."""
    calls: Counter[str] = Counter()
    inside = [False]
    for name in ("all_gather", "all_gather_object", "all_reduce", "broadcast", "gather", "reduce"):
        plain = getattr(dist, name)

        def counting(*args: object, plain: object = plain, name: str = name, **kwargs: object) -> object:
            if inside[0]:
                calls[name] += 1
            return plain(*args, **kwargs)  # type: ignore[operator]

        setattr(dist, name, counting)
    exchange = RankGather.exchange

    def exchanging(self: RankGather, *args: object) -> object:
        inside[0] = True
        calls["flushes"] += 1
        began = time.perf_counter()
        try:
            return exchange(self, *args)  # type: ignore[arg-type]
        finally:
            calls["microseconds"] += int(1e6 * (time.perf_counter() - began))
            inside[0] = False

    RankGather.exchange = exchanging  # type: ignore[method-assign, assignment]
    return calls


def summary(ranks: list[dict[str, object]]) -> dict[str, object]:
    """Overheads in percent, of the watched turns and of the control."""
    taken_RT2 = np.array([rank["taken"] for rank in ranks])
    wall_T, processor_T = taken_RT2[..., 0].max(0), taken_RT2[..., 1].sum(0)
    found: dict[str, object] = {"calls": ranks[0]["calls"], "bytes": ranks[0]["bytes"]}
    for name, times_T in (("wall", wall_T), ("processor", processor_T)):
        bare_B, watched_W = times_T[::2], times_T[1::2]
        found[f"{name} watched"] = _overhead(watched_W / ((bare_B[:-1] + bare_B[1:]) / 2))
        found[f"{name} control"] = _overhead(bare_B[1:-1] / ((bare_B[:-2] + bare_B[2:]) / 2))
        found[f"{name} ms"] = round(float(1e3 * np.median(bare_B)), 1)
    return found


def _overhead(ratios: np.ndarray) -> list[float]:
    """Median and the ends of its interval, percent."""
    percent = 100 * (ratios[None] - 1)
    return [round(float(x), 2) for x in (np.median(percent), *median_interval(percent))]


def _table(found: dict[str, dict[str, Any]]) -> Table:
    table = Table("world", "what", "bare turn, ms", "watched, %", "bare again, %")
    for name, one in found.items():
        for what in ("wall", "processor"):
            cells = []
            for arm in ("watched", "control"):
                middle, low, high = one[f"{what} {arm}"]
                cells.append(f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]")
            table.add_row(name, what, str(one[f"{what} ms"]), *cells)
        table.add_row(name, "collectives", str(one["calls"]), f"{one['bytes']} bytes", "")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

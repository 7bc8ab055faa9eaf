"""The parallel engine beside the local one: time of a step in one process.

Both engines run in this process, on the same batches, a step of one after a step of the other; the figure is the median of the
pairs' ratios. One process communicates with nobody, so only DeepSpeed's schedule and our own bookkeeping remain. ``engine_memory``
has the memory of several processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch._C._distributed_c10d import HashStore

from experiments.benchmarks._presets import preset
from experiments.benchmarks._worlds import batch, import_all
from glm.train.config import BatchConfig, TrainConfig
from glm.train.engine import Engine, LocalEngine
from stabilitylab.command_line import parse


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The parallel engine beside the local one.

    Attributes:
        preset: a preset of `glm train`.
        vocabulary: vocabulary size, where the preset leaves it open.
        rows: rows of an update.
        micro_rows: rows of a micro-batch.
        pairs: steps of each engine.
        precisions: compute formats to time.
        json: print one JSON object.
    """

    preset: str = "glm-tiny"
    vocabulary: int = 4096
    rows: int = 8
    micro_rows: int = 4
    pairs: int = 15
    precisions: tuple[str, ...] = ("fp32", "fp16")
    json: bool = False


def main(argv: Sequence[str]) -> int:
    settings: Settings = parse(Settings, argv, program="python -m experiments.benchmarks engine_overhead")
    torch.set_num_threads(1)
    import_all()

    times = {precision: _times(settings, precision) for precision in settings.precisions}
    if settings.json:
        print(json.dumps({"settings": dataclasses.asdict(settings), "seconds": times}))
        return 0
    Console().print(_time_table(times))
    return 0


def _config(settings: Settings, precision: str) -> TrainConfig:
    rows = BatchConfig(rows=settings.rows, micro_rows=settings.micro_rows)
    return preset(settings.preset, settings.vocabulary, batch=rows, precision=precision)


def _times(settings: Settings, precision: str) -> dict[str, float]:
    from glm.parallel.engine import ParallelEngine

    config = _config(settings, precision)
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        local, parallel = LocalEngine(config), ParallelEngine(config)
        pairs = []
        for step in range(settings.pairs + 2):
            order = (local, parallel) if step % 2 else (parallel, local)
            took = {id(engine): _step(engine, config, step) for engine in order}
            pairs.append((took[id(local)], took[id(parallel)]))
    finally:
        dist.destroy_process_group()
    pairs = pairs[2:]  # first touches
    return {
        "local": statistics.median(a for a, _ in pairs),
        "parallel": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def _step(engine: Engine, config: TrainConfig, step: int) -> float:
    rows = batch(config.model, config.batch.rows, step)
    began = time.process_time()
    engine.forward_backward(rows, step)
    engine.gradients()
    engine.update(1e-4, clip=1.0)
    return time.process_time() - began


def _time_table(times: dict[str, dict[str, float]]) -> Table:
    table = Table(
        "precision", "local, ms", "parallel, ms", "ratio", title="A step in one process, processor time"
    )
    for precision, one in times.items():
        table.add_row(
            precision, f"{1e3 * one['local']:.0f}", f"{1e3 * one['parallel']:.0f}", f"{one['ratio']:.3f}"
        )
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

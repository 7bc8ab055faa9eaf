"""How long training stands still for a checkpoint, written in the background or not.

A cycle is a few updates, preceded by nothing, by a checkpoint written at once, or by one that another thread writes meanwhile; the
three take turns in each process. A checkpoint's cost is how much longer its cycle is than the one without, as a median of pairs:
the copy, the agreement and the renaming, and what the writing thread takes from the updates beside it (cores, memory). Both ways
flush everything to disk (fsync) and compute checksums; weights and the masters' moments in fp32 are 12 bytes a parameter.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from experiments.benchmarks._worlds import batch, import_all, in_world
from glm.distributed.config import ParallelConfig
from glm.model.config import ModelConfig
from glm.train.checkpoint import Checkpoint
from glm.train.config import BatchConfig, TrainConfig
from glm.train.engine import Engine, LocalEngine
from stabilitylab.command_line import parse

HOW = ("none", "synchronous", "asynchronous")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The cost of a checkpoint, written while training continues or not.

    Attributes:
        layers: layers of the model.
        hidden: hidden width of the model.
        rows: rows, of 256 tokens, that each process takes in an update.
        steps: updates of a cycle; they should take longer than the writing.
        cycles: number of cycles of each kind.
        processes: number of replicas.
        folder: folder for the checkpoints; by default a temporary one.
        json: print one JSON object.
    """

    layers: int = 8
    hidden: int = 576
    rows: int = 1
    steps: int = 4
    cycles: int = 5
    processes: tuple[int, ...] = (1, 2)
    folder: Path | None = None
    json: bool = False


def main(argv: Sequence[str]) -> int:
    settings: Settings = parse(Settings, argv, program="python -m experiments.benchmarks checkpoint_stall")
    import_all()
    found = {}
    for ranks in settings.processes:
        # One process uses all cores; two share them.
        with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
            config = _config(settings, ranks)
            found[ranks] = in_world(config.parallel, partial(_cycles, settings, config, Path(folder)))[0]
    if settings.json:
        print(json.dumps({"settings": dataclasses.asdict(settings), "processes": found}, default=str))
        return 0
    _show(found)
    return 0


def _config(settings: Settings, ranks: int) -> TrainConfig:
    model = ModelConfig(
        vocabulary=8192,
        layers=settings.layers,
        hidden=settings.hidden,
        heads=settings.hidden // 64,
        length=256,
    )
    rows = BatchConfig(rows=settings.rows * ranks, micro_rows=1)
    return TrainConfig(model=model, batch=rows, parallel=ParallelConfig(data=ranks))


def _cycles(settings: Settings, config: TrainConfig, folder: Path) -> dict[str, float]:
    from glm.parallel.engine import ParallelEngine

    ranks = config.parallel.ranks
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    engine: Engine = LocalEngine(config) if ranks == 1 else ParallelEngine(config)
    step = 0
    took: dict[str, list[float]] = {how: [] for how in HOW}
    stood: dict[str, list[float]] = {how: [] for how in HOW}
    for number in range(settings.cycles + 1):
        for how in HOW[number % 3 :] + HOW[: number % 3]:
            step += settings.steps
            whole, still = _cycle(engine, settings, config, folder, step, how)
            if number:  # the first cycle touches memory for the first time
                took[how].append(whole)
                stood[how].append(still)
    extra = {
        how: statistics.median(a - b for a, b in zip(took[how], took["none"], strict=True)) for how in HOW[1:]
    }
    held = sum(tensor.numel() for tensor in engine.tensors()[0].values())
    return {
        "parameters": engine.processes.total([held])[0],
        "step": statistics.median(took["none"]) / settings.steps,
        "cost synchronous": extra["synchronous"],
        "cost asynchronous": extra["asynchronous"],
        "stands still synchronous": statistics.median(stood["synchronous"]),
        "stands still asynchronous": statistics.median(stood["asynchronous"]),
    }


def _cycle(
    engine: Engine, settings: Settings, config: TrainConfig, folder: Path, step: int, how: str
) -> tuple[float, float]:
    """Seconds of the whole cycle, and those of them without an update."""
    os.sync()  # what the last cycle left to the disk
    engine.processes.any(False)
    began = time.perf_counter()
    writing, still = None, 0.0
    if how != "none":
        weights, moments = engine.tensors()
        checkpoint = Checkpoint(step=step, model=weights, optimizer=moments, state={})
        writing = engine.begin_save(folder, checkpoint, background=how == "asynchronous")
        still = time.perf_counter() - began
    for i in range(settings.steps):
        if writing is not None and not engine.processes.any(not writing.done):
            now = time.perf_counter()
            writing.publish(keep=1)
            writing = None
            still += time.perf_counter() - now
        engine.forward_backward(batch(config.model, config.batch.rows, step + i), step + i)
        engine.gradients()
        engine.update(1e-4, clip=1.0)
    if writing is not None:
        now = time.perf_counter()
        writing.publish(keep=1)
        still += time.perf_counter() - now
    engine.processes.any(False)
    return time.perf_counter() - began, still


def _show(found: dict[int, dict[str, float]]) -> None:
    table = Table("processes", "parameters", "s a step", "", "s no update is made", "s a checkpoint costs")
    for ranks, one in found.items():
        for how in HOW[1:]:
            table.add_row(
                str(ranks),
                f"{one['parameters'] / 1e6:.1f} M",
                f"{one['step']:.2f}",
                how,
                f"{one[f'stands still {how}']:.2f}",
                f"{one[f'cost {how}']:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

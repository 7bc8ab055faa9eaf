"""The parallel engine's numbers beside the local engine's over a run: losses, gradient norms, weights.

Sums in another order differ by rounding. The local engine alone measures by how much: its micro-batches may have any size without
changing the update in exact arithmetic, so the largest distance between such runs is the yardstick. The benchmark prints every
topology's distance from the local run beside it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.benchmarks._worlds import batch, import_all, in_world
from glm.distributed.config import ParallelConfig
from glm.model.config import EmbeddingConfig, ModelConfig
from glm.precision import Precision
from glm.train.config import BatchConfig, TrainConfig
from glm.train.engine import Engine, LocalEngine
from stabilitylab.command_line import parse

# t, p, d, ZeRO's stage
AXES = ((2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (2, 2, 1, 1), (1, 2, 2, 1), (2, 1, 2, 1), (1, 1, 4, 1))
ZERO = tuple((t, 1, d, zero) for zero in (0, 2, 3) for t, d in ((1, 2), (2, 2), (1, 4)))
ROWS = 8
RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The parallel engine's numbers beside the local engine's.

    Attributes:
        steps: number of updates.
        precisions: compute formats to compare.
        zero: ZeRO stages to compare.
        seed: seed of the initial weights.
        json: print one JSON object.
    """

    steps: int = 50
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
    zero: tuple[int, ...] = (0, 1, 2, 3)
    seed: int = 0
    json: bool = False


Run = tuple[list[tuple[float, float, bool]], dict[str, Tensor]]


def main(argv: Sequence[str]) -> int:
    settings: Settings = parse(Settings, argv, program="python -m experiments.benchmarks engine_equivalence")
    torch.set_num_threads(1)
    import_all()

    found: dict[str, dict[str, dict[str, float]]] = {}
    for precision in settings.precisions:
        config = TrainConfig(
            precision=precision,
            seed=settings.seed,
            model=ModelConfig(
                vocabulary=512,
                layers=4,
                hidden=64,
                heads=4,
                length=64,
                embedding=EmbeddingConfig(gradient_shrink=0.5),
            ),
            batch=BatchConfig(rows=ROWS, micro_rows=2),
        )
        runs = {}
        for micro in (2, 1, 4, 8):
            one = dataclasses.replace(config, batch=BatchConfig(rows=ROWS, micro_rows=micro))
            runs[micro] = _run(LocalEngine(one), one, settings.steps)
        rows = {"local, other micro-batches": _worst([_distance(runs[m], runs[2]) for m in (1, 4, 8)])}
        for t, p, d, zero in (*AXES, *ZERO):
            if zero not in settings.zero:
                continue
            parallel = ParallelConfig(tensor=t, pipeline=p, data=d, zero=zero)
            one = dataclasses.replace(config, parallel=parallel)
            (run, *_) = in_world(one.parallel, partial(_parallel, one, settings.steps))
            rows[f"{t}x{p}x{d}, {zero}"] = _distance(run, runs[2])
        found[precision] = rows
    if settings.json:
        print(json.dumps({"settings": dataclasses.asdict(settings), "distances": found}))
        return 0
    table = Table(
        "precision",
        "t x p x d, ZeRO",
        "loss",
        "norm, relative",
        "weights, mean",
        "weights, largest",
        "skipped alike",
    )
    for format, rows in found.items():
        for name, distance in rows.items():
            numbers = [f"{distance[what]:.1e}" for what in ("loss", "norm", "mean", "largest")]
            table.add_row(format, name, *numbers, "yes" if distance["alike"] else "no")
    Console().print(table)
    return 0


def _run(engine: Engine, config: TrainConfig, steps: int) -> Run:
    curve = []
    for step in range(steps):
        loss = engine.forward_backward(batch(config.model, ROWS, step), step)
        norm = engine.gradients().global_norm
        curve.append((loss, norm, engine.update(RATE, clip=1.0)))
    return curve, {name: tensor.detach().clone() for name, tensor in engine.tensors()[0].items()}


def _parallel(config: TrainConfig, steps: int) -> Run:
    import torch.distributed as dist

    from glm.parallel.engine import ParallelEngine

    engine = ParallelEngine(config)
    curve, kept = _run(engine, config, steps)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, kept)
    whole = {
        name: share.whole({rank: everyone[rank][name] for rank in share.ranks()})
        for name, share in engine.shares.items()
    }
    return curve, whole


def _distance(a: Run, b: Run) -> dict[str, float]:
    pairs = list(zip(a[0], b[0], strict=True))
    differences = [(a[1][name] - b[1][name]).abs() for name in b[1]]
    elements = sum(x.numel() for x in differences)
    return {
        "loss": max(abs(x[0] - y[0]) for x, y in pairs),
        "norm": max(abs(x[1] / y[1] - 1) for x, y in pairs if x[2] and y[2]),
        "mean": sum(float(x.double().sum()) for x in differences) / elements,
        "largest": max(float(x.max()) for x in differences),
        "alike": float([x[2] for x in a[0]] == [y[2] for y in b[0]]),
    }


def _worst(found: list[dict[str, float]]) -> dict[str, float]:
    worst = {what: max(one[what] for one in found) for what in found[0]}
    return {**worst, "alike": min(one["alike"] for one in found)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

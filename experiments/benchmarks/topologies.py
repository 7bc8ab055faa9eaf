"""How do topologies of a few processes rank, by ``glm plan`` and measured?

    python -m experiments.benchmarks topologies --ranks 2

Every layout of ``--ranks`` processes as tensor x pipeline x data trains the same rows of a small GLM, each process on one thread,
over gloo on this machine. The plan gets rates measured on this machine a moment before: of a product of the model's size, of a copy
in memory, and of an all-reduce between two processes.

    work    processor seconds of a step, all processes together, without waiting. Beside it the plan's products, kernels,
            transfers (which here are copies that a core makes) and optimizer of all processes, without bubble
    wall    seconds of a step, beside the plan's with its bubble. Of more processes than idle cores it tells how the system shares
            them out, and is not compared

Agreement is Kendall's tau-b over the topologies (Kendall 1945): 1 is the same order, 0 none. With two or three of them tau is
coarse, so the benchmark prints every figure. Limits: gloo's copies cost processor time, a GPU's transfers do not; start of a
collective is the planner's 10 us, gloo's is some 100.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau

from experiments.benchmarks._presets import preset
from experiments.benchmarks._worlds import batch, import_all, in_world
from glm.distributed.config import ParallelConfig
from glm.planning.hardware import GIB, TRANSFER, Cluster, Gpu
from glm.planning.layout import Layout
from glm.planning.shape import Shape, shape_of
from glm.planning.step_time import step_time
from glm.train.config import BatchConfig, TrainConfig
from stabilitylab.command_line import parse

WARM = 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Order topologies.

    Attributes:
        preset: a preset of `glm train`.
        vocabulary: vocabulary size, where the preset leaves it open.
        ranks: number of processes.
        rows: rows of an update.
        micro_rows: rows of a micro-batch.
        steps: steps to time, after two that warm up.
        json: print one JSON object.
    """

    preset: str = "glm-tiny"
    vocabulary: int = 4096
    ranks: int = 2
    rows: int = 8
    micro_rows: int = 2
    steps: int = 7
    json: bool = False


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    settings: Settings = parse(Settings, argv, program="python -m experiments.benchmarks topologies")
    torch.set_num_threads(1)
    import_all()
    rows = BatchConfig(rows=settings.rows, micro_rows=settings.micro_rows)
    config = preset(settings.preset, settings.vocabulary, batch=rows)
    machine = _machine(config, settings)
    # On a CPU attention is one kernel.
    shape = dataclasses.replace(shape_of(config.model), softmax="kernel")
    found = {}
    for layout in layouts(settings, config.model.heads):
        plan = step_time(shape, layout, machine, settings.rows, "fp32")
        work, wall = _measured(config, layout, settings.steps)
        found[f"tp{layout.tensor} pp{layout.pipeline} dp{layout.data}"] = {
            "work": work,
            "planned": planned_work(shape, layout, machine, settings.rows),
            "wall": wall,
            "planned_wall": plan.seconds,
        }
    tau = agreement([(one["work"], one["planned"]) for one in found.values()])
    if settings.json:
        print(json.dumps({"topologies": found, "tau": tau}))
        return 0
    table = Table("topology", "work, s", "planned", "wall, s", "planned ", box=None, pad_edge=False)
    for name, one in sorted(found.items(), key=lambda pair: pair[1]["work"]):
        table.add_row(name, *(f"{value:.3f}" for value in one.values()))
    console = Console()
    console.print(table)
    gpu = machine.gpu
    console.print(
        f"products {gpu.flops / 2e9:.0f} GFLOP/s, memory {gpu.bandwidth / 1e9:.1f} GB/s, all-reduce {gpu.link / 1e9:.2f} GB/s"
    )
    console.print(f"order of work, measured against planned: tau {tau:+.2f} over {len(found)} topologies")
    return 0


def planned_work(shape: Shape, layout: Layout, machine: Cluster, rows: int) -> float:
    """Seconds that all processes together are busy in a step, from the planner's parts."""
    plan = step_time(shape, layout, machine, rows, "fp32")
    # All stages together: the plan's own is the slowest stage's.
    whole = step_time(shape, dataclasses.replace(layout, pipeline=1), machine, rows, "fp32")
    columns = layout.tensor * layout.data
    stages = columns * (whole.products + whole.kernels + whole.tensor.seconds)
    between = columns * (layout.pipeline - 1) * plan.pipeline.seconds
    return stages + between + layout.gpus * (plan.data.seconds + plan.optimizer)


def agreement(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau-b of pairs."""
    return float(kendalltau(*zip(*pairs, strict=True)).statistic)


def layouts(settings: Settings, heads: int) -> list[Layout]:
    """Every topology of this many processes that the rows and the heads allow."""
    n = settings.ranks
    found = []
    for tensor in (t for t in range(1, n + 1) if n % t == 0 and heads % t == 0):
        for pipeline in (p for p in range(1, n // tensor + 1) if (n // tensor) % p == 0):
            data = n // (tensor * pipeline)
            if settings.rows % (data * settings.micro_rows) == 0:
                found.append(
                    Layout(
                        tensor=tensor,
                        pipeline=pipeline,
                        data=data,
                        micro=settings.micro_rows,
                        recompute=False,
                    )
                )
    return found


def _machine(config: TrainConfig, settings: Settings) -> Cluster:
    """A core of this machine as a device, measured now."""
    model = config.model
    tokens = settings.micro_rows * model.length
    a, b = torch.randn(tokens, model.hidden), torch.randn(4 * model.hidden, model.hidden)
    products = 2.0 * a.numel() * len(b) / _seconds(lambda: torch.nn.functional.linear(a, b))
    big, into = torch.randn(1 << 24), torch.empty(1 << 24)
    memory = 2.0 * 4 * big.numel() / _seconds(lambda: into.copy_(big), 5)
    elements = tokens * model.hidden

    def reduced() -> float:
        x = torch.ones(elements)
        dist.all_reduce(x)
        began = time.process_time()
        for _ in range(20):
            dist.all_reduce(x)
        return (time.process_time() - began) / 20

    # Between two, a ring sends each byte once.
    link = 4.0 * elements / statistics.mean(in_world(ParallelConfig(data=2), reduced))
    gpu = Gpu(
        name="core",
        memory=64 * GIB,
        # The planner halves the rate for fp32, as TF32 units do.
        flops=2 * products,
        bandwidth=memory / TRANSFER,
        link=link / TRANSFER,
        network=link / TRANSFER,
        products=1.0,
    )
    return Cluster(nodes=1, per_node=settings.ranks, gpu=gpu)


def _seconds(call: object, times: int = 30) -> float:
    """Processor seconds of a call, median."""
    assert callable(call)
    spent = []
    for _ in range(times):
        began = time.process_time()
        call()
        spent.append(time.process_time() - began)
    return statistics.median(spent[times // 5 :])


def _measured(config: TrainConfig, layout: Layout, steps: int) -> tuple[float, float]:
    """Processor seconds of a step over all processes, and wall seconds; medians."""
    from glm.parallel.engine import ParallelEngine

    parallel = ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline, data=layout.data)
    own = dataclasses.replace(config, parallel=parallel)

    def work() -> list[tuple[float, float]]:
        torch.set_num_threads(1)
        engine, spent = ParallelEngine(own), []
        for step in range(WARM + steps):
            every = batch(own.model, own.batch.rows, step)
            mine = engine.own_rows(own.batch.rows)
            rows = dataclasses.replace(
                every,
                **{
                    field.name: getattr(every, field.name)[mine.start : mine.stop]
                    for field in dataclasses.fields(every)
                },
            )
            whole = engine.whole(rows, own.batch.rows)
            dist.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            engine.forward_backward(rows, step, whole)
            engine.gradients()
            engine.update(1e-4, clip=1.0)
            spent.append((time.process_time() - processor, time.perf_counter() - wall))
        return spent[WARM:]

    ranks = in_world(parallel, work)
    processor = [sum(one[0] for one in step) for step in zip(*ranks, strict=True)]
    wall = [max(one[1] for one in step) for step in zip(*ranks, strict=True)]
    return statistics.median(processor), statistics.median(wall)

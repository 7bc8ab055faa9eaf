"""Compares each rank's memory with the plan: what ZeRO's stages hold, and what activations take.

*States*, by (t, p, d) and ZeRO's stage: bytes of the tensors' storages on each rank between two micro-batches (weights: the most at
once), against ``glm plan``'s formula for its stage (``glm.planning.memory``).

*Activations*, by (t, p, d), kept or recomputed, and the update's peak: the allocator's own record (torch's profiler) of an update
after the first. With a(t) the bytes allocated since the update began:

    kept    a when the rank has finished its layers' forward pass of as many micro-batches as are in flight, and begun no backward
            pass: the plan's activations
    peak    largest a, less what is held before and counted as states: the plan's activations, gradients and working memory

In fp16 a CPU without half-precision units computes products in fp32; the plan is about accelerators, so here only fp32 compares.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from experiments.benchmarks._presets import preset
from experiments.benchmarks._worlds import batch, import_all, in_world
from glm.distributed.config import ParallelConfig
from glm.parallel.buckets import Coming
from glm.planning.hardware import parse_cluster
from glm.planning.layout import Layout
from glm.planning.memory import training_memory
from glm.planning.shape import shape_of
from glm.train.config import BatchConfig, TrainConfig
from glm.train.engine import LocalEngine
from stabilitylab.command_line import parse

STATES = (
    *((t, p, d, 1) for t, p, d in ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2))),
    *((t, 1, d, zero) for t, d in ((1, 2), (2, 2), (1, 4)) for zero in (0, 2, 3)),
)
PARTS = ("weights", "gradients", "optimizer")
ACTIVATIONS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1))
FORWARD_ENDS = "layers' forward pass ends"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Memory of each rank beside the plan.

    Attributes:
        preset: a preset of `glm train`.
        vocabulary: vocabulary size, where the preset leaves it open.
        length: tokens of a row, for activations.
        rows: rows of an update.
        micro_rows: rows of a micro-batch.
        states: precisions in which to measure states.
        activations: precisions in which to measure activations.
        json: print one JSON object.
    """

    preset: str = "glm-tiny"
    vocabulary: int = 4096
    length: int = 512
    rows: int = 8
    micro_rows: int = 2
    states: tuple[str, ...] = ("fp16", "bf16", "fp32")
    activations: tuple[str, ...] = ("fp32",)
    json: bool = False


def main(argv: Sequence[str]) -> int:
    settings: Settings = parse(Settings, argv, program="python -m experiments.benchmarks engine_memory")
    torch.set_num_threads(1)
    import_all()

    states = {
        f"{precision} {t}x{p}x{d}, {zero}": _states(settings, precision, t, p, d, zero)
        for precision in settings.states
        for t, p, d, zero in STATES
    }
    activations = {
        f"{precision} {t}x{p}x{d}, {'recomputed' if recompute else 'kept'}": _activations(
            settings, precision, t, p, d, recompute
        )
        for precision in settings.activations
        for recompute in (False, True)
        for t, p, d in ACTIVATIONS
    }
    if settings.json:
        found = {"settings": dataclasses.asdict(settings), "states": states, "activations": activations}
        print(json.dumps(found))
        return 0
    console = Console()
    console.print(_table("t x p x d, ZeRO", states, PARTS, "States"))
    console.print(_table("t x p x d", activations, ("activations", "peak"), "Activations"))
    return 0


Found = dict[str, list[dict[str, float]]]


def _states(settings: Settings, precision: str, t: int, p: int, d: int, zero: int) -> Found:
    """Measured and planned bytes of each rank."""
    config = _config(settings, precision, ParallelConfig(tensor=t, pipeline=p, data=d, zero=zero))

    def measured() -> dict[str, float]:
        from glm.parallel.engine import ParallelEngine
        from glm.parallel.optimizer import ShardedAdamW

        engine = ParallelEngine(config)
        live = list(engine.model.parameters())
        most = _bytes(live)
        assert isinstance(engine.optimizer, ShardedAdamW)
        place = engine.optimizer.place

        def place_and_look(unit: str, coming: list[Coming]) -> None:
            nonlocal most
            place(unit, coming)
            most = max(most, _bytes([*live, *(tensor for one in coming for tensor in (one.sent, one.rows))]))

        engine.optimizer.place = place_and_look  # type: ignore[method-assign]
        engine.forward_backward(batch(config.model, config.batch.rows, 0), 0)
        kept = [tensor for tensors in engine.tensors() for tensor in tensors.values()]
        return {
            "stage": engine.stage,
            "weights": most,
            "gradients": _bytes(engine.optimizer.accumulated().values()),
            # In fp32 on one holder the weights are the masters.
            "optimizer": _bytes([*kept, *live]) - _bytes(live),
        }

    found = in_world(config.parallel, measured)
    planned = []
    for one in found:
        parts = _planned(settings, config, int(one["stage"]))
        planned.append({part: parts[part] for part in PARTS})
    return {"measured": found, "planned": planned}


def _activations(settings: Settings, precision: str, t: int, p: int, d: int, recompute: bool) -> Found:
    """Measured and planned bytes of each rank."""
    config = _config(settings, precision, ParallelConfig(tensor=t, pipeline=p, data=d))
    model = dataclasses.replace(config.model, recompute=recompute, length=settings.length)
    config = dataclasses.replace(config, model=model)

    def measured() -> dict[str, float]:
        from glm.parallel.engine import ParallelEngine

        engine: Any = LocalEngine(config) if config.parallel.ranks == 1 else ParallelEngine(config)
        stage = getattr(engine, "stage", 0)
        _update(engine, config, 0)
        in_flight = min(p - stage, config.batch.rows // d // config.batch.micro)
        last = next(
            layer for layer in reversed(engine.model.layers) if not isinstance(layer, torch.nn.Identity)
        )
        forward: list[int] = []

        def mark(*_: Any) -> None:
            forward.append(1)
            if len(forward) == in_flight:
                with record_function(FORWARD_ENDS):
                    pass

        last.register_forward_hook(mark)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            engine.forward_backward(_batch(config, 1), 1)
        kept, peak = _record(recorded)
        return {"stage": stage, "activations": kept, "peak": peak}

    found = in_world(config.parallel, measured)
    planned = []
    for one in found:
        parts = _planned(settings, config, int(one["stage"]))
        peak = parts["activations"] + parts["gradients"] + parts["working"]
        planned.append({"activations": parts["activations"], "peak": peak})
    return {"measured": found, "planned": planned}


def _update(engine: Any, config: TrainConfig, step: int) -> None:
    engine.forward_backward(_batch(config, step), step)
    engine.gradients()
    engine.update(1e-4, clip=1.0)


def _batch(config: TrainConfig, step: int) -> Any:
    """Every token has a target, as the plan has it."""
    rows = batch(config.model, config.batch.rows, step)
    rows.targets_BT.clamp_(min=0)
    return rows


def _record(recorded: profile) -> tuple[float, float]:
    """Bytes allocated at the mark, and at the most."""
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    now, most, marked = 0, 0, -1
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == FORWARD_ENDS:
            marked = now
        elif event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]  # missing in torch's stub
            most = max(most, now)
    assert marked >= 0
    return float(marked), float(most)


def _config(settings: Settings, precision: str, parallel: ParallelConfig) -> TrainConfig:
    rows = BatchConfig(rows=settings.rows, micro_rows=settings.micro_rows)
    return preset(settings.preset, settings.vocabulary, batch=rows, precision=precision, parallel=parallel)


def _planned(settings: Settings, config: TrainConfig, stage: int) -> dict[str, float]:
    parallel = config.parallel
    layout = Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=parallel.data,
        micro=settings.micro_rows,
        recompute=config.model.recompute,
        zero=parallel.zero,
    )
    gpu = parse_cluster("1x8xA100-40G").gpu
    shape = shape_of(config.model)
    return training_memory(shape, layout, stage, settings.rows, gpu, config.precision).parts()


def _bytes(tensors: Iterable[Tensor]) -> float:
    """Bytes of the tensors' storages, each once."""
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return float(sum(storages.values()))


def _table(first: str, rows: dict[str, Found], parts: Sequence[str], title: str) -> Table:
    table = Table(first, "rank", *(f"{part}, MB (plan)" for part in parts), "all / plan", title=title)
    for name, one in rows.items():
        for rank, (found, planned) in enumerate(zip(one["measured"], one["planned"], strict=True)):
            cells = [f"{found[part] / 1e6:.2f} ({planned[part] / 1e6:.2f})" for part in parts]
            ratio = sum(found[part] for part in parts) / sum(planned[part] for part in parts)
            table.add_row(name, str(rank), *cells, f"{ratio:.3f}")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

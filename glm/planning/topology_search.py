"""Every topology that a cluster, a model and a batch allow, ranked by the seconds of an update.

The search tries each factorisation t p d of the number of GPUs, micro-batches of 1, 2, 4, ... rows, with and without recomputation,
ZeRO-1 and, without a pipeline, ZeRO-2 and 3 (ZeRO-0 sends as much as ZeRO-1 and holds more, so it is never better). It drops a
topology if

    heads, feed-forward width or vocabulary are not multiples of t
    a stage would have no layer
    the rows of an update do not fall evenly into micro-batches on d replicas
    a GPU's memory is too small

and counts the reasons, so that it can say why nothing fits on a cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from glm.errors import InputError
from glm.planning.hardware import GIB, Cluster
from glm.planning.layout import Layout, stage_layers
from glm.planning.memory import Memory, peak_memory
from glm.planning.shape import Shape
from glm.planning.step_time import StepTime, step_time

LARGEST_MICRO = 16


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A feasible layout and its cost."""

    layout: Layout
    micro_batches: int
    memory: Memory
    time: StepTime


@dataclass(frozen=True, kw_only=True)
class Search:
    """The search's result.

    Attributes:
        plans: feasible ones, quickest first.
        rejected: reason -> number of layouts.
        examples: reason -> one instance of it, in words.
        nearest: the layout that came closest to fitting in memory, with its needs.
    """

    plans: tuple[TrainingPlan, ...]
    rejected: dict[str, int]
    examples: dict[str, str]
    nearest: tuple[Layout, Memory] | None

    @property
    def considered(self) -> int:
        return len(self.plans) + sum(self.rejected.values())


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def refusal(shape: Shape, tensor: int, pipeline: int) -> tuple[str, str] | None:
    """Why a model cannot be cut so, and the instance in words; None if it can."""
    for what, size in (
        ("heads", shape.heads),
        ("feed-forward width", shape.inner),
        ("vocabulary", shape.vocabulary),
    ):
        if size % tensor:
            return what, f"{what} {size} is not a multiple of tensor {tensor}"
    if pipeline > shape.layers or min(stage_layers(shape.layers, pipeline)) < 1:
        return "layers", f"{shape.layers} layers do not fill {pipeline} pipeline stages"
    return None


def layouts(gpus: int, rows: int) -> Iterator[tuple[Layout | None, str]]:
    """Every layout of that many GPUs, or None with the reason why a family of them has no even micro-batches."""
    for tensor in divisors(gpus):
        for pipeline in divisors(gpus // tensor):
            data = gpus // (tensor * pipeline)
            if rows % data:
                yield None, f"{rows} rows do not divide over {data} replicas"
                continue
            micro = 1
            while micro <= LARGEST_MICRO and (rows // data) % micro == 0:
                for zero in (1, 2, 3) if pipeline == 1 and data > 1 else (1,):
                    for recompute in (False, True):
                        yield (
                            Layout(
                                tensor=tensor,
                                pipeline=pipeline,
                                data=data,
                                micro=micro,
                                recompute=recompute,
                                zero=zero,
                            ),
                            "",
                        )
                micro *= 2


def search(shape: Shape, cluster: Cluster, rows: int, precision: str = "fp16") -> Search:
    """Rank every feasible layout of a model on a cluster for updates of ``rows`` rows."""
    plans: list[TrainingPlan] = []
    rejected: Counter[str] = Counter()
    examples: dict[str, str] = {}
    nearest: tuple[Layout, Memory] | None = None
    for layout, reason in layouts(cluster.gpus, rows):
        if layout is None:
            rejected["rows"] += 1
            examples.setdefault("rows", reason)
            continue
        why = refusal(shape, layout.tensor, layout.pipeline)
        if why is not None:
            rejected[why[0]] += 1
            examples.setdefault(*why)
            continue
        memory = peak_memory(shape, layout, rows, cluster.gpu, precision)
        if memory.total > cluster.gpu.memory:
            rejected["memory"] += 1
            if nearest is None or memory.total < nearest[1].total:
                nearest = layout, memory
            continue
        time = step_time(shape, layout, cluster, rows, precision)
        plans.append(
            TrainingPlan(layout=layout, micro_batches=layout.micro_batches(rows), memory=memory, time=time)
        )
    plans.sort(key=lambda plan: plan.time.seconds)
    return Search(
        plans=tuple(plans), rejected=dict(rejected.most_common()), examples=examples, nearest=nearest
    )


def require_plans(found: Search, cluster: Cluster, rows: int) -> Search:
    """The search itself. Raises InputError with the reason where nothing is feasible."""
    if found.plans:
        return found
    if found.nearest is not None:
        layout, memory = found.nearest
        raise InputError(
            f"nothing fits on {cluster}: the nearest, tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
            f"{' recomputed' if layout.recompute else ''} with ZeRO-{layout.zero}, needs {memory.total / GIB:.1f} GiB of "
            f"{cluster.gpu.memory / GIB:.1f}, most of it {memory.largest()} ({memory.parts()[memory.largest()] / GIB:.1f}): "
            "give more GPUs, or larger ones"
        )
    reasons = "; ".join(found.examples.values())
    raise InputError(
        f"no topology of {cluster.gpus} GPUs suits the model and {rows} rows ({reasons}): change --gpus or --batch"
    )

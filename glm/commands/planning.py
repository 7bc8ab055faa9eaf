"""``glm plan``: what a model costs on a cluster, on paper."""

from __future__ import annotations

from json import dumps
from typing import Annotated, Literal

import tyro
from rich.console import Console

from glm.errors import InputError
from glm.planning.hardware import parse_cluster
from glm.planning.reliability import GPU_HOURS_PER_FAILURE, RESTART_SECONDS, Reliability, reliability
from glm.planning.scenarios import scenarios
from glm.planning.serving import serving_plans
from glm.planning.shape import Shape, shape_of
from glm.planning.tables import (
    duration,
    memory_table,
    scenario_table,
    scenario_values,
    search_values,
    serving_table,
    serving_values,
    time_table,
)
from glm.planning.topology_search import TrainingPlan, require_plans, search
from glm.presets import PRESETS

# The columns of a plan need this much; a narrower terminal wraps them.
WIDTH = 150


def plan(
    preset: Annotated[str, tyro.conf.Positional],
    *,
    gpus: str,
    batch: int | None = None,
    precision: Literal["fp16", "bf16", "fp32"] = "fp16",
    quantize: Literal["fp16", "int8", "int4"] | None = None,
    rows: int = 1,
    length: int | None = None,
    vocabulary: int | None = None,
    shown: int = 12,
    what_if: bool = False,
    tokens: float = 400e9,
    gpu_hours_per_failure: float = GPU_HOURS_PER_FAILURE,
    restart: float = RESTART_SECONDS,
    json: bool = False,
) -> int:
    """Rank every feasible topology of a training run, or with --quantize say what serving the model takes.

    Args:
        preset: model, as in `glm train`.
        gpus: NODESxGPUSxNAME, such as 96x8xA100-40G; one node: 8xA100-40G.
        batch: rows of an update; by default 5.5 a GPU: GLM-130B's 4,224 on 768 GPUs.
        precision: compute format of training.
        quantize: format of the weights to serve; plans serving instead of training.
        rows: rows served at once.
        length: tokens of a row; by default the preset's.
        vocabulary: vocabulary size, for presets that take theirs from the data.
        shown: number of plans to list.
        what_if: list other GPUs too, and 1,000 to 100,000 of them with their failures.
        tokens: tokens of the whole run, to say how many days it takes.
        gpu_hours_per_failure: GPU-hours between failures; 50,000 is Llama 3's.
        restart: seconds from a failure to the next step.
        json: print one JSON object instead of tables.
    """
    if preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    positive = {
        "batch": batch,
        "rows": rows,
        "length": length,
        "vocabulary": vocabulary,
        "shown": shown,
        "tokens": tokens,
        "gpu-hours-per-failure": gpu_hours_per_failure,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise InputError(f"--{name} must be positive, got {value}")
    if restart < 0:
        raise InputError(f"--restart is a time in seconds, 0 or more, got {restart}")
    cluster = parse_cluster(gpus)
    shape = shape_of(PRESETS[preset].model, vocabulary=vocabulary, length=length)
    console = Console(width=max(WIDTH, Console().width), soft_wrap=False)
    about = {"preset": preset, "parameters": shape.parameters, "gpus": str(cluster)}
    if quantize is not None:
        served = serving_plans(shape, cluster, quantize=quantize, rows=rows)
        if json:
            print(dumps({**about, "rows": rows, "serving": [serving_values(one) for one in served]}))
        else:
            console.print(_headline(preset, shape))
            console.print(serving_table(served, cluster))
        return 0
    rows_an_update = batch or max(1, round(5.5 * cluster.gpus))
    found = require_plans(search(shape, cluster, rows_an_update, precision), cluster, rows_an_update)
    failing = {"gpu_hours_per_failure": gpu_hours_per_failure, "restart": restart}
    what = (
        scenarios(shape, cluster, rows_an_update, tokens=tokens, precision=precision, **failing)
        if what_if
        else []
    )
    if json:
        values = {**about, "batch": rows_an_update, "precision": precision, **search_values(found, shown)}
        print(dumps({**values, "what_if": [scenario_values(one) for one in what]}))
        return 0
    console.print(_headline(preset, shape))
    out = ", ".join(f"{reason} {count:,}" for reason, count in found.rejected.items())
    console.print(
        f"{len(found.plans):,} of {found.considered:,} layouts of {cluster} are feasible for updates of {rows_an_update:,} rows in "
        f"{precision}; in the way of the others: {out or 'nothing'}"
    )
    best = found.plans[:shown]
    failures = reliability(shape, gpus=cluster.gpus, nodes=cluster.nodes, **failing)
    tables = [time_table(best), memory_table(best, cluster), _quickest(best[0], failures, tokens)]
    for part in [*tables, *([scenario_table(what, tokens)] if what else [])]:
        console.print()
        console.print(part)
    return 0


def _quickest(best: TrainingPlan, failures: Reliability, tokens: float) -> str:
    """How long the whole run takes by the quickest plan, failures included."""
    days = tokens / (best.time.tokens_per_second * failures.goodput) / 86_400
    return (
        f"Quickest: {best.time.tokens_per_second:,.0f} tokens/s. A failure every {duration(failures.between_failures)}, a "
        f"checkpoint of {duration(failures.checkpoint)} every {duration(failures.interval)}: {failures.goodput:.1%} of the time is "
        f"kept, and {tokens:,.0f} tokens take {days:,.1f} days."
    )


def _headline(preset: str, shape: Shape) -> str:
    return (
        f"{preset}: {shape.parameters / 1e9:,.1f}B parameters, {shape.layers} layers of {shape.hidden}, "
        f"rows of {shape.length:,} tokens, {2 * shape.parameters / 1e9:,.0f} GB in fp16"
    )

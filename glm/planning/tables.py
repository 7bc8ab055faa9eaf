"""Plans to read: rich tables, and the same as plain values for ``--json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from glm.planning.hardware import GIB, Cluster
from glm.planning.scenarios import Scenario
from glm.planning.serving import Serving
from glm.planning.topology_search import Search, TrainingPlan

MINUTE, HOUR, DAY = 60.0, 3_600.0, 86_400.0


def duration(seconds: float) -> str:
    """Two or three figures and a unit."""
    for size, unit in ((DAY, "d"), (HOUR, "h"), (MINUTE, "min"), (1.0, "s")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def gib(size: float) -> str:
    """Bytes in GiB, with one decimal."""
    return f"{size / GIB:.1f}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _choice(plan: TrainingPlan) -> list[str]:
    layout = plan.layout
    return [
        f"{layout.tensor}x{layout.pipeline}x{layout.data}",
        str(layout.micro),
        "yes" if layout.recompute else "no",
        str(layout.zero),
    ]


CHOICE = ("t x p x d", "micro", "recompute", "ZeRO")


def time_table(plans: Sequence[TrainingPlan]) -> Table:
    """A table of where an update's seconds go."""
    table = _table(
        "Time of an update, seconds; bubble is (p-1)/(m+p-1); limit: the largest part that is not matrix products",
        ("#", *CHOICE, "m", "total", "products", "kernels", "tensor", "pipeline", "data", "bubble", "MFU", "HFU", "limit"),
    )  # fmt: skip
    for number, plan in enumerate(plans, 1):
        time = plan.time
        parts = time.parts()
        table.add_row(
            str(number),
            *_choice(plan),
            str(plan.micro_batches),
            f"{time.seconds:.4g}",
            *(f"{parts[name]:.3g}" for name in ("products", "kernels", "tensor", "pipeline", "data")),
            f"{time.bubble:.1%}",
            f"{time.mfu:.1%}",
            f"{time.hfu:.1%}",
            f"{time.limit()} {parts[time.limit()] / time.seconds:.0%}",
        )
    return table


def memory_table(plans: Sequence[TrainingPlan], cluster: Cluster) -> Table:
    """A table of what the fullest GPU holds, and what it sends per update."""
    table = _table(
        f"Memory of the fullest GPU, GiB of {gib(cluster.gpu.memory)}; sent by a GPU in an update, GB",
        ("#", *CHOICE, "total", "weights", "gradients", "optimizer", "activations", "working", "reserved",
         "| tensor", "pipeline", "data"),
    )  # fmt: skip
    for number, plan in enumerate(plans, 1):
        time = plan.time
        table.add_row(
            str(number),
            *_choice(plan),
            gib(plan.memory.total),
            *(gib(size) for size in plan.memory.parts().values()),
            *(f"{part.sent / 1e9:.4g}" for part in (time.tensor, time.pipeline, time.data)),
        )
    return table


def serving_table(plans: Sequence[Serving], cluster: Cluster) -> Table:
    """A table of what a GPU holds when it serves the model."""
    table = _table(
        f"{plans[0].quantize} on {cluster}: memory of a GPU, GiB of {gib(plans[0].capacity)}; token: lower bound of its time",
        ("tensor", "fits", "total", "weights", "cache", "working", "reserved", "rows that fit", "token"),
    )
    for plan in plans:
        table.add_row(
            str(plan.tensor),
            "yes" if plan.fits else "no",
            *(gib(size) for size in (plan.total, plan.weights, plan.cache, plan.working, plan.reserved)),
            str(plan.rows_that_fit),
            duration(plan.seconds_per_token) if plan.fits else "-",
        )
    return table


def scenario_table(scenarios: Sequence[Scenario], tokens: float) -> Table:
    """A table of other clusters, with failures."""
    table = _table(
        f"What if: the quickest topology, failures, the best checkpoint interval (Daly), days for {tokens:,.0f} tokens",
        ("cluster", "GPUs", "rows", *CHOICE, "update", "MFU", "failure every", "checkpoint", "interval", "goodput", "days"),
    )  # fmt: skip
    for one in scenarios:
        failures = one.reliability
        plan = one.plan
        found = (
            ["-"] * 6
            if plan is None
            else [*_choice(plan), duration(plan.time.seconds), f"{plan.time.mfu:.1%}"]
        )
        table.add_row(
            str(one.cluster),
            f"{one.cluster.gpus:,}",
            f"{one.rows:,}",
            *found,
            duration(failures.between_failures),
            duration(failures.checkpoint),
            duration(failures.interval),
            f"{failures.goodput:.1%}",
            "-" if one.days is None else f"{one.days:.3g}",
        )
    return table


def plan_values(plan: TrainingPlan) -> dict[str, Any]:
    """A plan for JSON: seconds, bytes, shares."""
    time = plan.time
    return {
        **asdict(plan.layout),
        "micro_batches": plan.micro_batches,
        "memory": {**plan.memory.parts(), "total": plan.memory.total},
        "seconds": time.seconds,
        "parts": time.parts(),
        "sent": {"tensor": time.tensor.sent, "pipeline": time.pipeline.sent, "data": time.data.sent},
        "bubble": time.bubble,
        "mfu": time.mfu,
        "hfu": time.hfu,
        "tokens_per_second": time.tokens_per_second,
        "limit": time.limit(),
    }


def search_values(found: Search, shown: int) -> dict[str, Any]:
    """What the search covered, and the first plans."""
    return {
        "considered": found.considered,
        "feasible": len(found.plans),
        "rejected": found.rejected,
        "plans": [plan_values(plan) for plan in found.plans[:shown]],
    }


def serving_values(plan: Serving) -> dict[str, Any]:
    """A serving plan for JSON: bytes and seconds."""
    return {**asdict(plan), "total": plan.total, "fits": plan.fits}


def scenario_values(one: Scenario) -> dict[str, Any]:
    """A scenario for JSON."""
    return {
        "cluster": str(one.cluster),
        "gpus": one.cluster.gpus,
        "rows": one.rows,
        "plan": None if one.plan is None else plan_values(one.plan),
        "reliability": asdict(one.reliability),
        "days": one.days,
    }

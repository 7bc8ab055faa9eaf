"""What if: the same model on other GPUs, and on 1,000 to 100,000 of them, with failures.

Each scenario keeps the batch (strong scaling: whether a larger one still trains as well per token is another question, 1812.06162),
and doubles it only while no topology divides it; takes the quickest topology; and multiplies its speed by the goodput of the best
checkpoint interval.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm.planning.hardware import Cluster, find_gpu
from glm.planning.reliability import Reliability, reliability
from glm.planning.shape import Shape
from glm.planning.topology_search import TrainingPlan, search

NODES = (128, 512, 2_048, 8_192, 12_288)
OTHER_GPUS = ("A100-80G", "H100-80G")
LARGEST_GROWTH = 32


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A cluster, its best plan if there is one, and its failures.

    Attributes:
        rows: of an update.
        days: to train on the given number of tokens, with failures; None where nothing fits.
    """

    cluster: Cluster
    rows: int
    plan: TrainingPlan | None
    reliability: Reliability
    days: float | None


def scenario(
    shape: Shape,
    cluster: Cluster,
    rows: int,
    *,
    tokens: float,
    precision: str,
    gpu_hours_per_failure: float,
    restart: float,
) -> Scenario:
    """The quickest plan of a cluster, and its speed after failures."""
    largest = rows * LARGEST_GROWTH
    plans = search(shape, cluster, rows, precision).plans
    while not plans and rows < largest:
        rows *= 2
        plans = search(shape, cluster, rows, precision).plans
    failures = reliability(
        shape,
        gpus=cluster.gpus,
        nodes=cluster.nodes,
        gpu_hours_per_failure=gpu_hours_per_failure,
        restart=restart,
    )
    best = plans[0] if plans else None
    days = None
    if best is not None and failures.goodput > 0:
        days = tokens / (best.time.tokens_per_second * failures.goodput) / 86_400
    return Scenario(cluster=cluster, rows=rows, plan=best, reliability=failures, days=days)


def scenarios(
    shape: Shape,
    cluster: Cluster,
    rows: int,
    *,
    tokens: float,
    precision: str,
    gpu_hours_per_failure: float,
    restart: float,
) -> list[Scenario]:
    """The given cluster, then others."""
    names = dict.fromkeys([cluster.gpu.name, *OTHER_GPUS])
    tried = [cluster]
    tried += [Cluster(nodes=nodes, per_node=8, gpu=find_gpu(name)) for name in names for nodes in NODES]
    return [
        scenario(
            shape,
            one,
            rows,
            tokens=tokens,
            precision=precision,
            gpu_hours_per_failure=gpu_hours_per_failure,
            restart=restart,
        )
        for one in tried
    ]

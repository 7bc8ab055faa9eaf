"""Bytes that one GPU sends per update, and how long that takes.

A ring all-reduce of n bytes over k ranks sends 2 (k - 1)/k n from each; a reduce-scatter or all-gather half of it. With e bytes a
number, micro-batches of b rows of s tokens, m of them, L/p layers and N parameters on the GPU:

    tensor     per layer and micro-batch 2 all-reduces of e s b h forward, 2 backward, 2 more if recomputed (1909.08053)
               and one each at the embedding and at the output
    pipeline   e s b h forward and again backward per micro-batch and boundary; with v chunks v times as often, in t parts
    data       a reduce-scatter of N gradients in the accumulation format (fp32 for bf16) and an all-gather of e N
                                                                                                   (ZeRO, 1910.02054, section 7)
               ZeRO-2 reduces after every micro-batch, ZeRO-3 gathers the weights twice a micro-batch as well, matrix by matrix

A group lies inside a node or spans nodes. A ring with k members in each node leaves a node through the network cards of those k
GPUs. ZeRO-3's gathers do not: they reach the rate of one of the node's cards (2104.04473, table 2: 66 s a micro-batch for 3 x 350
GB). We know of no run that went faster, however many cards its nodes had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from glm.planning.hardware import (
    HOP,
    LATENCY,
    RING_START,
    RING_STEP,
    RING_STEP_NETWORK,
    TRANSFER,
    Cluster,
)
from glm.planning.layout import Layout, stage_layers
from glm.planning.memory import BYTES, accumulator_bytes
from glm.planning.shape import Shape

# Gathers of a layer under ZeRO-3: its four matrices, each when its turn comes (DeepSpeed; a trainer that gathers a layer at once
# starts a quarter as many).
GATHERS = 4


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Bytes that one GPU sends per update, and seconds if nothing else ran."""

    sent: float
    seconds: float


def ring_share(ranks: int) -> float:
    """Bytes that a rank sends in an all-reduce, per byte of the tensor."""
    return 2 * (ranks - 1) / ranks


def group_rate(cluster: Cluster, ranks: int, stride: int) -> float:
    """Bytes/s of a ring of ``ranks`` GPUs whose numbers lie ``stride`` apart."""
    gpu, span = cluster.gpu, (ranks - 1) * stride + 1
    if span <= cluster.per_node:
        return gpu.link * TRANSFER
    members = max(1, cluster.per_node // stride)
    return min(gpu.link, gpu.network * min(members, ranks)) * TRANSFER


def collective_seconds(sent: float, ranks: int, rate: float, count: int = 1) -> float:
    """Time of ``count`` equal all-reduces that send ``sent`` bytes together."""
    if ranks == 1:
        return 0.0
    return sent / rate + count * (LATENCY + HOP * math.log2(ranks))


def ring_start(cluster: Cluster, ranks: int, stride: int) -> float:
    """Seconds that an all-gather or reduce-scatter of this many GPUs takes beside its bytes: a step from each to the next."""
    members = max(1, min(ranks, cluster.per_node // stride))
    between = math.ceil(ranks / members) - 1
    return RING_START + between * RING_STEP_NETWORK + (ranks - 1 - between) * RING_STEP


def tensor_transfer(
    shape: Shape, layout: Layout, cluster: Cluster, rows: int, precision: str
) -> Communication:
    """All-reduces inside the tensor group, of the stage with the most layers."""
    t = layout.tensor
    layers = max(stage_layers(shape.layers, layout.pipeline))
    ends = 2 if layout.pipeline == 1 else 1
    count = layout.micro_batches(rows) * (layers * (6 if layout.recompute else 4) + ends)
    message = BYTES[precision] * layout.micro * shape.length * shape.hidden
    sent = count * ring_share(t) * message
    return Communication(
        sent=sent, seconds=collective_seconds(sent, t, group_rate(cluster, t, 1), count) if t > 1 else 0.0
    )


def pipeline_transfer(
    shape: Shape, layout: Layout, cluster: Cluster, rows: int, precision: str
) -> Communication:
    """Activations and their gradients between stages, of a stage in the middle."""
    if layout.pipeline == 1:
        return Communication(sent=0.0, seconds=0.0)
    count = 2 * layout.micro_batches(rows) * layout.chunks
    parts = layout.tensor if layout.chunks > 1 else 1
    sent = float(count * BYTES[precision] * layout.micro * shape.length * shape.hidden) / parts
    apart = layout.tensor * layout.data
    rate = (
        cluster.gpu.link
        if layout.gpus <= cluster.per_node and apart < cluster.per_node
        else cluster.gpu.network
    )
    return Communication(sent=sent, seconds=sent / (rate * TRANSFER) + count * (LATENCY + HOP))


def data_transfer(shape: Shape, layout: Layout, cluster: Cluster, rows: int, precision: str) -> Communication:
    """Gradients (and under ZeRO the weights back) between replicas, of the stage with the most parameters."""
    d = layout.data
    if d == 1:
        return Communication(sent=0.0, seconds=0.0)
    stages = stage_layers(shape.layers, layout.pipeline)
    parameters = max(shape.stage_parameters(layout.tensor, stages, stage) for stage in (0, len(stages) - 1))
    share, m = ring_share(d) / 2 * parameters, layout.micro_batches(rows)
    # Per update: reduce-scatters of gradients, in the width of their accumulator, and all-gathers of weights.
    reduced, gathered = {0: (2, 0), 1: (1, 1), 2: (m, 1), 3: (m, 2 * m)}[layout.zero]
    sent = share * (reduced * accumulator_bytes(precision) + gathered * BYTES[precision])
    rate = group_rate(cluster, d, layout.tensor)
    count = reduced + gathered
    if layout.zero == 3:
        count *= GATHERS * max(stages)
        if (d - 1) * layout.tensor >= cluster.per_node:
            rate = min(rate, cluster.gpu.network * TRANSFER)
    return Communication(sent=sent, seconds=sent / rate + count * ring_start(cluster, d, layout.tensor))

"""Serving a model: what each GPU holds, and how fast its memory lets it generate tokens.

Linear layers of attention and feed-forward have the quantized format with one fp16 scale a row (GLM-130B, 2210.02414, section 3 and
appendix); embeddings, norms and biases stay fp16. Of P matrix elements in b bits:

    weights    P b / 8 + 2 rows + 2 (everything else), split over t GPUs
    cache      keys and values, 2 L h 2 bytes a token, split over t
    working    one matrix widened to fp16 (weight-only quantization multiplies in fp16), and one layer's activations and logits

A generated token reads all weights and the cache once: seconds >= bytes on a GPU / memory rate, plus two all-reduces a layer, which
for one token are latency. This leaves out reading the prompt.

Checked against the published fit: GLM-130B is 260 GB in fp16 and about 70 GB in INT4, and its INT4 weights run on 4 GPUs of 24 GB
or 8 of 11 GB (section 3).
Limits: a lower bound, with kernels at 0.8 of the memory rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from glm.errors import InputError
from glm.planning.hardware import GIB, HOP, LATENCY, TRANSFER, Cluster
from glm.planning.memory import reserved
from glm.planning.shape import Shape
from glm.planning.topology_search import divisors, refusal

BITS = {"fp16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True, kw_only=True)
class Serving:
    """One GPU of a tensor group of ``tensor`` that serves ``rows`` rows of ``shape.length`` tokens. Bytes.

    Attributes:
        seconds_per_token: lower bound of a generated token's time, for all rows together.
        rows_that_fit: the most rows of that length.
    """

    quantize: str
    tensor: int
    weights: float
    cache: float
    working: float
    reserved: float
    capacity: float
    seconds_per_token: float
    rows_that_fit: int

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.working + self.reserved

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


def weight_bytes(shape: Shape, quantize: str) -> float:
    """Bytes of the whole model's weights."""
    bits = BITS[quantize]
    matrices = shape.layers * shape.matrices
    rest = shape.parameters - matrices
    rows = shape.layers * (3 * shape.hidden + shape.hidden + shape.up + shape.hidden)
    return matrices * bits / 8 + 2 * rest + (2 * rows if bits < 16 else 0)


def serving(shape: Shape, cluster: Cluster, *, tensor: int, quantize: str, rows: int = 1) -> Serving:
    """What a GPU holds when ``tensor`` of them serve the model."""
    tokens = shape.length
    gpu = cluster.gpu
    weights = weight_bytes(shape, quantize) / tensor
    row_cache = 2 * shape.layers * shape.hidden * 2 * tokens / tensor
    widened = 2 * max(shape.up, 3 * shape.hidden) * shape.hidden / tensor if BITS[quantize] < 16 else 0
    # Reading a prompt: hidden states, the feed-forward's input projection, one row's fp32 scores, the last position's logits.
    hidden = 2 * rows * tokens * (2 * shape.hidden + (3 * shape.hidden + shape.up) / tensor)
    scores = 0 if shape.softmax == "fused" else 6 * shape.heads / tensor * tokens**2
    working = widened + max(hidden, scores) + 6 * rows * shape.vocabulary / tensor
    kept = reserved(gpu, gpus=1)
    per_row = row_cache + 2 * tokens * (2 * shape.hidden + (3 * shape.hidden + shape.up) / tensor)
    room = gpu.memory - kept - weights - widened
    all_reduces = 2 * shape.layers * (LATENCY + HOP * math.log2(tensor)) if tensor > 1 else 0.0
    read = (weights + rows * row_cache) / (gpu.bandwidth * TRANSFER)
    return Serving(
        quantize=quantize,
        tensor=tensor,
        weights=weights,
        cache=rows * row_cache,
        working=working,
        reserved=kept,
        capacity=gpu.memory,
        seconds_per_token=read + all_reduces,
        rows_that_fit=max(0, int(room // per_row)),
    )


def serving_plans(shape: Shape, cluster: Cluster, *, quantize: str, rows: int = 1) -> list[Serving]:
    """Every tensor group that the cluster's nodes and the model allow, smallest first.

    Raises:
        InputError: none fits; the message says why.
    """
    tried = [
        serving(shape, cluster, tensor=tensor, quantize=quantize, rows=rows)
        for tensor in divisors(cluster.gpus)
        if refusal(shape, tensor, 1) is None
    ]
    if any(plan.fits for plan in tried):
        return tried
    best = min(tried, key=lambda plan: plan.total)
    smaller = [name for name in BITS if BITS[name] < BITS[quantize]]
    raise InputError(
        f"{quantize} does not fit on {cluster}: a GPU would hold {best.total / GIB:.1f} GiB of {best.capacity / GIB:.1f} "
        f"({best.weights / GIB:.1f} of weights, {best.cache / GIB:.1f} of cache): give more GPUs"
        + (f", or --quantize {' or '.join(smaller)}" if smaller else "")
    )

"""Seconds of an update, from its parts.

A micro-batch of b rows occupies the slowest stage for

    slot = products + kernels + tensor + pipeline

    products   FLOPs / (t x peak x share reached): forward 1, backward 2, recomputed 1 more
    kernels    bytes that norms, activations, residuals and scores move / memory rate; backward 1.5 times forward; and those of
               accumulating a micro-batch's gradient: e read, and the accumulator read and written, a parameter. It is
               half for fp16 and fp32 else (Megatron-LM's main_grad, and DeepSpeed's of bf16); under ZeRO-2 and 3 a share
    tensor, pipeline   communication, which nothing hides

where the slowest stage is one in the middle, or the last with its output projection (3 products of 2 h V, never recomputed). The
update takes m + (p - 1)/v slots: the bubble (p - 1)/(v m + p - 1), v chunks a stage. Gradients are then reduced, and the optimizer
moves its 28 bytes a parameter. ZeRO-2 reduces during the backward pass and ZeRO-3 gathers during all products: the time beyond them
counts, and a share of the shorter of both, since they slow each other down.

MFU counts the model's FLOPs, HFU the recomputed ones too (PaLM, 2204.02311, appendix B; GLM-130B reports 32.5 % and 43.3 %).

Checked on 28 published runs (``python -m experiments.benchmarks published_runs``, and a test): 27 within 10 %. We chose the
constants on Megatron-LM's ten and on two of ZeRO-3's; unseen, GLM-130B, BLOOM, OPT-175B and PTD come out within 5.3 %, ZeRO-3's
other four -9 to +7 %, MT-NLG 7 to 12 % too fast: on 2,240, 2,800 and 3,360 GPUs each of its updates takes some 4 s more than
planned, however many micro-batches it has, and no publication says where they go. A trainer whose products add into the accumulator
themselves (fused accumulation, later than these runs) saves the first e. Limits: efficiency does not depend on the size of a
matrix, so models narrower than about 1,000 a GPU come out too fast; the model leaves out stragglers, data loading and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm.planning.communication import (
    Communication,
    data_transfer,
    pipeline_transfer,
    tensor_transfer,
)
from glm.planning.hardware import CONTENTION, TRANSFER, Cluster
from glm.planning.layout import Layout, bubble, stage_layers
from glm.planning.memory import BYTES, accumulator_bytes
from glm.planning.shape import Shape

# Bytes an attention score moves in a forward pass, in half precision. Eager fp32 softmax: written 2, widened 2 + 4, unscaled 4 + 4,
# masked 4 + 4, softmax 4 + 4, rounded 4 + 2, read 2.
SCORE_BYTES = {"fp32": 40.0, "pb-relax": 44.0, "compute": 12.0, "kernel": 10.0, "fused": 0.0}
BACKWARD = 1.5
OPTIMIZER_BYTES = 28.0


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of an update by part, and rates derived from them."""

    products: float
    kernels: float
    tensor: Communication
    pipeline: Communication
    data: Communication
    exposed_data: float
    waiting: float
    optimizer: float
    bubble: float
    mfu: float
    hfu: float
    tokens: int

    @property
    def seconds(self) -> float:
        return sum(self.parts().values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def parts(self) -> dict[str, float]:
        return {
            "products": self.products,
            "kernels": self.kernels,
            "tensor": self.tensor.seconds,
            "pipeline": self.pipeline.seconds,
            "data": self.exposed_data,
            "bubble": self.waiting,
            "optimizer": self.optimizer,
        }

    def limit(self) -> str:
        """The largest part that is not arithmetic."""
        parts = {name: seconds for name, seconds in self.parts().items() if name != "products"}
        return max(parts, key=lambda name: parts[name])


def kernel_bytes(shape: Shape, rows: int, tensor: int, precision: str) -> float:
    """Bytes that a layer's elementwise kernels move in a forward pass."""
    e, tokens = BYTES[precision], rows * shape.length
    # A norm reads and writes; a residual sum reads two and writes one; the branch's scale reads and writes.
    whole = e * tokens * shape.hidden * (2 * shape.norms + 2 * 3 + 2)
    # Rotation of q and k, three reads and writes each; the activation reads its input and writes, the gate reads two and writes.
    split = e * tokens * (2 * 3 * shape.hidden + shape.inner * (5 if shape.gated else 2))
    score = SCORE_BYTES[shape.softmax] * (e / 2 if shape.softmax == "compute" else 1)
    return whole + (split + score * rows * shape.heads * shape.length**2) / tensor


def accumulation_bytes(shape: Shape, layout: Layout, precision: str) -> float:
    """Bytes moved by adding a micro-batch's gradient of a layer to the earlier ones."""
    e = BYTES[precision]
    held = shape.layer_parameters(layout.tensor) / (layout.data if layout.zero >= 2 else 1)
    return held * (e + 2 * accumulator_bytes(precision))


def step_time(shape: Shape, layout: Layout, cluster: Cluster, rows: int, precision: str = "fp16") -> StepTime:
    """Time of an update of ``rows`` rows."""
    gpu, m, b = cluster.gpu, layout.micro_batches(rows), layout.micro
    tokens = b * shape.length
    layers = max(stage_layers(shape.layers, layout.pipeline))
    rate = gpu.flops * gpu.products * layout.tensor
    if precision == "fp32":
        rate /= 2  # TF32 units
    passes = 4 if layout.recompute else 3
    flops = layers * shape.layer_flops(tokens) * passes
    # The last stage has the output projection beside its layers; the slowest stage sets the pace.
    stages = stage_layers(shape.layers, layout.pipeline)
    flops = max(flops, stages[-1] * shape.layer_flops(tokens) * passes + 3 * shape.output_flops(tokens))
    moved = layers * kernel_bytes(shape, b, layout.tensor, precision)
    products = flops / rate
    accumulated = layers * accumulation_bytes(shape, layout, precision)
    kernels = (moved * (passes - 2 + BACKWARD) + accumulated) / (gpu.bandwidth * TRANSFER)
    tensor = tensor_transfer(shape, layout, cluster, rows, precision)
    pipeline = pipeline_transfer(shape, layout, cluster, rows, precision)
    data = data_transfer(shape, layout, cluster, rows, precision)
    busy = m * (products + kernels) + tensor.seconds + pipeline.seconds
    parameters = shape.stage_parameters(layout.tensor, stage_layers(shape.layers, layout.pipeline), 0)
    optimizer = (
        OPTIMIZER_BYTES * parameters / (layout.data if layout.zero >= 1 else 1) / (gpu.bandwidth * TRANSFER)
    )
    share = bubble(layout.pipeline, m, layout.chunks)
    waiting = busy * share / (1 - share)
    exposed = data.seconds
    if layout.zero >= 2:
        # Hidden by products meanwhile: all of them for ZeRO-3's gathers, the backward pass for reductions.
        behind = m * products if layout.zero == 3 else m * products * 2 / passes
        exposed = max(0.0, data.seconds - behind) + CONTENTION * min(data.seconds, behind)
    seconds = busy + waiting + exposed + optimizer
    peak = cluster.gpus * gpu.flops * seconds
    all_tokens = rows * shape.length
    return StepTime(
        products=m * products,
        kernels=m * kernels,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        exposed_data=exposed,
        waiting=waiting,
        optimizer=optimizer,
        bubble=share,
        mfu=shape.model_flops(all_tokens) / peak,
        hfu=shape.hardware_flops(all_tokens, recompute=layout.recompute) / peak,
        tokens=all_tokens,
    )

"""Memory of one GPU in training, by component, for each pipeline stage.

With e bytes a number in the compute format and N parameters on the GPU:

    weights      e N                    under ZeRO-3 the gathered: the largest unit twice and its share, while it arrives
    gradients    e N   (bf16: 4 N more, its fp32 accumulation)             e N / d (bf16: 4 N / d) under ZeRO-2 and 3
    optimizer    12 N  fp32 master and two moments                         / d under ZeRO-1, 2 and 3, those of a tied matrix
                       then also over the two end stages that hold it; 8 N in fp32 where not spread: weights are the masters
    activations  what one micro-batch keeps for its backward pass x micro-batches in flight, min(p - k, m) on stage k
    working      the largest of: a layer's backward pass, with the layer's own activations where they are recomputed; the output
                 loss on the last stage; the update's fp32 gradient, less the activations whose room it has; under ZeRO-2 and 3
                 the gradient of a unit and its fp32 copy that is summed
    reserved     the driver's context, collectives' buffers, and 4 % lost to fragmentation

A layer keeps (Korthikanti et al., 2205.05198, section 4, recounted for our block and a tensor group of t; a test holds it to what
autograd saves): inputs of the norms and of both sublayers, e s b h each; q, k, v and the attention output, 4 e s b h / t; the
scores' softmax in fp32 and rounded, (4 + e) a s^2 b / t; the feed-forward's inner tensors, e s b i / t each (four if gated,
else two).
Recomputed, a layer keeps its input alone. A micro-batch also keeps the stage's output, between stages its input in the pipeline's
buffer, and what all layers need of places: the mask, 4 s^2 b, and rotations, 2 e s b h / a.

A layer's backward pass holds gradients of the feed-forward's inner tensors, later those of the scores before and after the softmax.
The loss holds fp32 gradients of both operands and a chunk of fp32 logits twice, once and its half gradient where ranks share it.

ZeRO reduces and gathers a unit at one time: a layer, or an embedding (``glm.parallel.zero``).

The fp32 gradient of the output matrix exists from forward to backward of a micro-batch's loss (``glm.model.vocabulary_loss``).

Limits: peak sizes of tensors, not an allocator's trace (``python -m experiments.benchmarks engine_memory`` has one beside it); the
optimizer's own temporaries are those of one parameter group; the count leaves out ALiBi's biases, one a head, and dropped causal
masks.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm.model.chunks import CHUNK_ELEMENTS
from glm.planning.hardware import GIB, Gpu
from glm.planning.layout import Layout, stage_layers
from glm.planning.shape import Shape

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
CONTEXT = 0.6 * GIB
COLLECTIVES = 1.0 * GIB
FRAGMENTED = 0.04


def accumulator_bytes(precision: str) -> int:
    """Bytes per number of the accumulator of micro-batches' gradients: half for fp16, fp32 else (Megatron-LM's main_grad, and
    DeepSpeed's of bf16).
    """
    return BYTES[precision] if precision == "fp16" else BYTES["fp32"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU by component; see the module's docstring."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    reserved: float

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "working": self.working,
            "reserved": self.reserved,
        }

    def largest(self) -> str:
        """The component that takes most."""
        parts = self.parts()
        return max(parts, key=lambda name: parts[name])


def reserved(gpu: Gpu, *, gpus: int) -> float:
    """Memory of a GPU that tensors cannot use."""
    return CONTEXT + (COLLECTIVES if gpus > 1 else 0.0) + FRAGMENTED * gpu.memory


def layer_activations(shape: Shape, rows: int, tensor: int, precision: str) -> float:
    """Bytes that one layer keeps for its backward pass, not recomputed."""
    e, tokens = BYTES[precision], rows * shape.length
    # Per norm its input; per sublayer the input of its first matrix. Parallel blocks share both.
    whole = e * tokens * shape.hidden * (shape.norms + (1 if shape.norms == 1 else 2))
    if shape.dropout:
        whole += 2 * e * tokens * shape.hidden
    # Norms of q and k keep the q, k, v product.
    split = e * tokens * shape.hidden * (4 + (3 if shape.head_norms else 0))
    split += e * tokens * shape.inner * (4 if shape.gated else 2)
    if shape.softmax != "fused":
        wide = 4 + e if shape.softmax != "compute" and e < 4 else e
        split += wide * rows * shape.heads * shape.length**2
    return whole + split / tensor


def layer_working(shape: Shape, rows: int, tensor: int, precision: str, *, recompute: bool) -> float:
    """Bytes that a layer's backward pass holds at once, beside gradients of weights and what the forward pass kept."""
    e, tokens = BYTES[precision], rows * shape.length
    again = layer_activations(shape, rows, tensor, precision) if recompute else 0.0
    gradients = e * tokens * (shape.up + shape.inner) / tensor
    # The feed-forward comes first, and its recomputed tensors are gone when attention's turn comes.
    left = again - e * tokens * shape.inner * (4 if shape.gated else 2) / tensor
    wide = 0 if shape.softmax == "fused" else e if shape.softmax == "compute" else 4
    scores = 2 * wide * rows * shape.heads * shape.length**2 / tensor
    return max(again + gradients, left + scores)


def micro_batch_activations(shape: Shape, layout: Layout, stage: int, precision: str) -> float:
    """Bytes that a micro-batch in flight keeps on a stage."""
    stages = stage_layers(shape.layers, layout.pipeline)
    one_input = BYTES[precision] * layout.micro * shape.length * shape.hidden
    if layout.recompute:
        kept = stages[stage] * float(one_input)
    else:
        kept = stages[stage] * layer_activations(shape, layout.micro, layout.tensor, precision)
    places = (
        layout.micro * shape.length * (4 * shape.length + 2 * BYTES[precision] * shape.hidden / shape.heads)
    )
    # A stage's output stays until the backward pass; so does its input, in the pipeline's buffer.
    return kept + places + (2 if stage > 0 else 1) * one_input


def training_memory(
    shape: Shape, layout: Layout, stage: int, rows: int, gpu: Gpu, precision: str = "fp16"
) -> Memory:
    """What a GPU of ``stage`` holds at the peak of an update of ``rows`` rows."""
    e, d = BYTES[precision], layout.data
    zero = layout.zero if d > 1 else 0
    stages = stage_layers(shape.layers, layout.pipeline)
    last = stage == layout.pipeline - 1
    parameters = shape.stage_parameters(layout.tensor, stages, stage)
    matrix = shape.vocabulary * shape.hidden / layout.tensor
    unit = max(matrix, shape.layer_parameters(layout.tensor))
    states = 12 if precision != "fp32" or zero >= 1 else 8
    spread = layout.zero >= 1 and shape.tied and layout.pipeline > 1 and (stage == 0 or last)
    optimizer = states * parameters + ((12 / 2 - states) * matrix if spread else 0)
    in_flight = min(layout.pipeline - stage, layout.micro_batches(rows))
    tokens = layout.micro * shape.length
    activations = in_flight * micro_batch_activations(shape, layout, stage, precision)
    working = [
        layer_working(shape, layout.micro, layout.tensor, precision, recompute=layout.recompute),
        4.0 * parameters / (d if zero >= 1 else 1) - activations,
    ]
    if last:
        logits = min(CHUNK_ELEMENTS, tokens * shape.vocabulary / layout.tensor)
        chunk = 8 if layout.tensor == 1 else 4 + e % 4
        working.append((8 + e % 4) * matrix + (4 + e) * tokens * shape.hidden + chunk * logits)
    if zero >= 2:
        working.append((e + 4 + 4 / d) * unit)
    wide_gradients = 4 if precision == "bf16" else 0
    gradients = (wide_gradients or e) / d if zero >= 2 else e + wide_gradients
    return Memory(
        weights=e * (unit * (2 + 1 / d) if zero >= 3 else parameters),
        gradients=gradients * parameters,
        optimizer=optimizer / (d if zero >= 1 else 1),
        activations=activations,
        working=max(working),
        reserved=reserved(gpu, gpus=layout.gpus),
    )


def peak_memory(shape: Shape, layout: Layout, rows: int, gpu: Gpu, precision: str = "fp16") -> Memory:
    """Memory of the fullest stage: the first holds the most micro-batches, the last the loss, the middle the most layers."""
    candidates = {0, layout.pipeline // 2, layout.pipeline - 1}
    return max(
        (training_memory(shape, layout, stage, rows, gpu, precision) for stage in sorted(candidates)),
        key=lambda memory: memory.total,
    )

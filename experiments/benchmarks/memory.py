"""Memory of training by component, by formula and measured, in fp32, bf16 and fp16.

With N parameters, e bytes a number in the compute format, V x h the output matrix, n target positions:

    weights      e N
    masters      4 N in half precision; in fp32 the weights are the masters
    moments      8 N
    gradients    held from one micro-batch to the next: 4 N, in fp16 2 N
    ... at the end of a later micro-batch's backward pass: bf16 has its half gradient as well: 6 N
    ... in the update: an fp32 gradient: fp16 has 6 N
    activations  what a micro-batch keeps for its backward pass: ``glm.planning.memory.layer_activations`` a layer, and the
                 final norm's input. Half products computed in fp32 by hand keep the rounded softmax only, and without the
                 compiled kernel q, k, v together, with it nothing of what a gated GELU has between; fp32 without the compiled
                 kernel keeps q, k, v, and what the softmax has mixed, twice. fp32 computes inputs of matrices again
                 (``glm.precision.recomputed``): those that LayerNorm makes, and with the kernel gated GELU
    loss         peak of the vocabulary loss beyond its operands: gradients 4 V h + 4 n h, a chunk of logits twice (once in the
                 compiled kernel), and in half precision fp32 copies of both operands, or of one and a product; where half
                 products are native, of a chunk of the logits' gradient a half and two fp32 copies as well, else an fp32 copy
                 and a second gradient 4 V h. ``plain``: whole logits and their softmax, 8 n V

Measured: bytes of the tensors' storages in a running engine; for activations the tensors that autograd keeps; for the loss the
allocator's own record. Only ``loss`` is an allocator's trace; the rest leaves out an allocator's rounding up.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from experiments.benchmarks._presets import preset
from glm.data.batch import Batch
from glm.model.chunks import CHUNK_ELEMENTS
from glm.model.transformer import Transformer
from glm.model.vocabulary_loss import vocabulary_loss
from glm.planning.memory import BYTES, layer_activations
from glm.planning.shape import shape_of
from glm.precision import PrecisionPolicy, upcasts
from glm.precision.kernel import kernel
from glm.train.config import BatchConfig, TrainConfig
from glm.train.engine import LocalEngine
from stabilitylab.command_line import parse

PRECISIONS = ("fp32", "bf16", "fp16")
STATES = ("weights", "masters", "moments", "gradients")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Memory of training by component.

    Attributes:
        preset: a preset of `glm train`.
        vocabulary: vocabulary size, where the preset leaves it open.
        rows: rows of a micro-batch; two micro-batches make an update.
        threads: torch's threads.
        json: print one JSON object.
    """

    preset: str = "glm-tiny"
    vocabulary: int = 4096
    rows: int = 4
    threads: int = 1
    json: bool = False


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code."""
    settings: Settings = parse(Settings, arguments, program="python -m experiments.benchmarks memory")
    torch.set_num_threads(settings.threads)
    result = {precision: measure(settings, precision) for precision in PRECISIONS}
    if settings.json:
        print(json.dumps({"settings": dataclasses.asdict(settings), **result}))
        return 0
    table = Table("MB", *(f"{p}, {what}" for p in PRECISIONS for what in ("formula", "measured")))
    for name in result["fp32"]["formula"]:
        cells = (result[p][what].get(name) for p in PRECISIONS for what in ("formula", "measured"))
        table.add_row(name, *("" if cell is None else f"{cell / 1e6:.2f}" for cell in cells))
    console = Console()
    console.print(table)
    for when, by_precision in states_compared(result).items():
        console.print(
            f"bf16 needs {by_precision:+.1%} of fp16's memory for weights, masters, moments, gradients {when}"
        )
    return 0


def states_compared(result: dict[str, Any]) -> dict[str, float]:
    """How much more bf16 holds than fp16, by measurement, at each of the three moments."""
    moments = {
        "between micro-batches": "gradients",
        "at the end of a backward pass": "gradients, backward",
        "in the update": "gradients, update",
    }

    def total(precision: str, gradients: str) -> float:
        found = result[precision]["measured"]
        return float(sum(found[name] for name in STATES[:3]) + found[gradients])

    return {when: total("bf16", name) / total("fp16", name) - 1 for when, name in moments.items()}


def measure(settings: Settings, precision: str) -> dict[str, dict[str, float]]:
    """Bytes by component."""
    batch_config = BatchConfig(rows=2 * settings.rows, micro_rows=settings.rows)
    config = preset(settings.preset, settings.vocabulary, precision=precision, batch=batch_config)
    return {"formula": formula(config), "measured": measured(config)}


def formula(config: TrainConfig) -> dict[str, float]:
    """The module's formulas."""
    e, n, model = BYTES[config.precision], config.model.parameters(), config.model
    shape, tokens = shape_of(model), config.batch.micro * model.length
    by_hand = upcasts(torch.empty(0, dtype=PrecisionPolicy(precision=config.precision).compute_dtype))
    compiled = (by_hand or e == 4) and kernel() is not None
    layer = layer_activations(shape, config.batch.micro, 1, config.precision)
    if by_hand and compiled:
        layer -= e * tokens * shape.inner * shape.gated
        layer -= 4 * config.batch.micro * shape.heads * shape.length**2
    elif by_hand:
        layer += 2 * e * tokens * shape.hidden
        layer -= 4 * config.batch.micro * shape.heads * shape.length**2
    elif e == 4 and not compiled and shape.softmax != "fused" and not shape.head_norms:
        layer += 3 * e * tokens * shape.hidden
    if e == 4:
        if model.norm in ("pre", "sandwich", "deepnorm", "deepnet") and model.norm_kind == "layer":
            layer -= (1 if shape.norms == 1 else 2) * e * tokens * shape.hidden
        if compiled and model.feed_forward.kind == "geglu":
            layer -= 2 * e * tokens * shape.inner
    matrix, targets = shape.vocabulary * shape.hidden, tokens
    chunk = min(targets, max(1, CHUNK_ELEMENTS // shape.vocabulary)) * shape.vocabulary
    loss = 4 * matrix + 4 * targets * shape.hidden + (4 if compiled else 8) * chunk
    if e == 2:
        loss += 4 * (matrix + targets * shape.hidden)
    # By hand and in fp32 oneDNN reads the logits' gradient in an order of its own, and the weights' has its own place.
    loss += 4 * chunk + 4 * matrix if by_hand or e == 4 else 10 * chunk
    wide = 4 if config.precision == "bf16" else 0
    return {
        "weights": e * n,
        "masters": 4 * n if e == 2 else 0,
        "moments": 8 * n,
        "gradients": wide * n or e * n,
        "gradients, backward": (e + wide) * n,
        "gradients, update": (wide or (4 + e if e == 2 else 4)) * n,
        "activations": model.layers * layer + e * tokens * shape.hidden,
        "loss": loss,
        "loss, plain": 8 * targets * shape.vocabulary,
    }


def measured(config: TrainConfig) -> dict[str, float]:
    """The same, measured in a running engine."""
    engine = LocalEngine(config)
    batch, live = random_batch(config), list(engine.model.parameters())
    masters, moments = engine.tensors()
    backward: list[float] = []
    accumulate: Callable[[], None] = engine.optimizer.accumulate

    def accumulate_and_look() -> None:
        seen = [p.grad for p in live if p.grad is not None] + list(engine.optimizer.accumulated().values())
        backward.append(storage_bytes(seen))
        accumulate()

    engine.optimizer.accumulate = accumulate_and_look  # type: ignore[method-assign]
    engine.forward_backward(batch, 0)
    between = storage_bytes(engine.optimizer.accumulated().values())
    summary = engine.gradients()
    update = storage_bytes([*summary.accumulated.values(), *summary.gradients.values()])
    engine.update(1e-3, clip=1.0)
    micro = tuple(
        part[: config.batch.micro]
        for part in (batch.tokens_BT, batch.positions, batch.segments_BT, batch.context_BT, batch.targets_BT)
    )
    return {
        "weights": storage_bytes(live),
        "masters": storage_bytes(masters.values()) if engine.policy.has_masters else 0,
        "moments": storage_bytes(moments.values()),
        "gradients": between,
        "gradients, backward": backward[-1],
        "gradients, update": update,
        "activations": kept_bytes(engine.model, micro),
        "loss": loss_peak(engine.model, micro),
    }


def storage_bytes(tensors: Iterable[Tensor]) -> float:
    """Bytes of the tensors' storages, each once."""
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return float(sum(storages.values()))


def kept_bytes(model: Transformer, micro: tuple[Tensor, ...]) -> float:
    """Bytes that autograd keeps of a forward pass, without weights, inputs and tensors that layers share."""
    tokens_BT, positions, segments_BT, context_BT, _ = micro
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Bound to a name: nothing may free the kept tensors before they are counted.
        hidden_BTC = model.hidden(tokens_BT, positions, segments_BT, context_BT)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # All layers share masks and rotations; norms keep two numbers a token.
    least = tokens_BT.numel() * 2 + 1
    turned = model.config.head * tokens_BT.numel()
    own = [
        t for t in kept if t.untyped_storage().data_ptr() not in weights and t.numel() >= max(least, turned)
    ]
    del hidden_BTC
    return storage_bytes(own)


def loss_peak(model: Transformer, micro: tuple[Tensor, ...]) -> float:
    """Most bytes that the vocabulary loss allocates at once."""
    tokens_BT, *_, targets_BT = micro
    weight = model.output_weight()
    hidden_NC = torch.randn(tokens_BT.numel(), weight.shape[1]).to(weight.dtype).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        vocabulary_loss(hidden_NC, weight, targets_BT.flatten())
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return float(most)


def random_batch(config: TrainConfig) -> Batch:
    """Rows of random tokens, half of each context, a target at every position."""
    rows, length = config.batch.rows, config.model.length
    vocabulary = config.model.vocabulary
    assert vocabulary is not None
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, vocabulary, (rows, length), generator=generator)
    place_BT = torch.arange(length).expand(rows, length).contiguous()
    return Batch(
        tokens_BT=tokens_BT,
        targets_BT=tokens_BT.roll(-1, 1),
        positions=place_BT,
        segments_BT=torch.zeros(rows, length, dtype=torch.int32),
        context_BT=place_BT < length // 2,
        provenance=((),) * rows,
    )

"""The planner's parts against the real model, naive twins and SciPy."""

from __future__ import annotations

import dataclasses
import heapq
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.utils.flop_counter import FlopCounterMode

from glm.errors import InputError
from glm.model.block import Block
from glm.model.config import AttentionConfig, EmbeddingConfig, FeedForwardConfig, ModelConfig
from glm.model.positions import rotation, score_bias, visible
from glm.model.transformer import Transformer
from glm.planning.communication import group_rate, ring_share
from glm.planning.hardware import GIB, TRANSFER, parse_cluster
from glm.planning.layout import Layout, bubble, stage_layers
from glm.planning.memory import BYTES, layer_activations, training_memory
from glm.planning.reliability import daly_interval, goodput, young_interval
from glm.planning.serving import weight_bytes
from glm.planning.shape import shape_of
from glm.planning.topology_search import divisors, layouts, search
from glm.precision.half_units import upcasts
from glm.precision.kernel import has_kernel, kernel
from glm.presets import PRESETS

MODEL = ModelConfig(vocabulary=96, layers=4, hidden=32, heads=4, length=16)
VARIANTS = {
    "deepnorm geglu": MODEL,
    "sandwich": dataclasses.replace(MODEL, norm="sandwich"),
    "post": dataclasses.replace(MODEL, norm="post"),
    "pre gelu": dataclasses.replace(MODEL, norm="pre", feed_forward=FeedForwardConfig(kind="gelu")),
    "parallel, no biases": dataclasses.replace(MODEL, norm="pre", parallel_block=True, bias=False),
    "qk norm": dataclasses.replace(MODEL, attention=AttentionConfig(qk_norm=True)),
    "dropout": dataclasses.replace(MODEL, dropout=0.1),
}


def batch(config: ModelConfig, rows: int) -> tuple[torch.Tensor, ...]:
    tokens_BT = torch.zeros(rows, config.length, dtype=torch.int64)
    positions_BT = torch.arange(config.length).expand(rows, -1)
    segments_BT = torch.zeros(rows, config.length, dtype=torch.int32)
    return tokens_BT, positions_BT, segments_BT, torch.zeros(rows, config.length, dtype=torch.bool)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_models(name):
    model = dataclasses.replace(PRESETS[name].model, vocabulary=1000)
    with torch.device("meta"):
        built = sum(p.numel() for p in Transformer(model).parameters())
    assert shape_of(model).parameters == built


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_parts_of_a_model_add_up(tensor, pipeline, tied):
    model = dataclasses.replace(MODEL, embedding=EmbeddingConfig(tied=tied))
    shape, stages = shape_of(model), stage_layers(MODEL.layers, pipeline)
    parts = sum(shape.stage_parameters(tensor, stages, stage) for stage in range(pipeline))
    copies = (tensor - 1) * (MODEL.layers * shape.whole_vectors + shape.last_parameters(1, alone=True) * tied)
    if not tied:
        copies += (tensor - 1) * 2 * MODEL.hidden
    again = MODEL.hidden * 96 if tied and pipeline > 1 else 0
    assert parts * tensor == shape.parameters + copies + again


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_layers_activations_are_what_autograd_saves(name, precision):
    config, rows = VARIANTS[name], 2
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    block = Block(config, 0).to(dtype)
    _, positions_BT, segments_BT, context_BT = batch(config, rows)
    turned = rotation(positions_BT, config.head, 10_000.0, dtype, two=False)
    bias_B1TT = score_bias(visible(segments_BT, context_BT), None, torch.float32)
    given = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *turned, bias_B1TT)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Norm statistics (two numbers a token) are not counted by the formula.
        if (
            tensor.untyped_storage().data_ptr() not in given
            and tensor.numel() > rows * config.length * config.heads
        ):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x_BTC = torch.randn(rows, config.length, config.hidden, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x_BTC, bias_B1TT, turned, keys_B=torch.arange(rows))
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    hidden = rows * config.length * config.hidden
    odd = 0
    if precision == "fp32" and config.attention.softmax != "fused" and kernel() is None:
        # On a CPU without the compiled kernel the softmax's gradient subtracts a term that it takes from the result, which stays
        # beside the copy that the output projection reads; and v is a view of the q, k, v product, which stays whole.
        odd += BYTES[precision] * hidden * (0 if config.attention.qk_norm else 3)
    if precision == "fp32":
        # The backward pass computes a matrix's input again where a norm or the kernel's gated GELU made it; post-norm's first
        # matrix reads the layer's input.
        odd -= BYTES[precision] * hidden * (1 if config.parallel_block or config.norm == "post" else 2)
        if kernel() is not None and config.feed_forward.kind == "geglu":
            odd -= 2 * BYTES[precision] * rows * config.length * shape_of(config).inner
    if has_kernel(x_BTC, half=True) and precision == "fp16":
        # The compiled kernel keeps the q, k, v product whole and the attention output, no scores, and of a gated GELU what it is
        # computed from alone.
        odd += BYTES[precision] * hidden * 2 - 6 * rows * config.heads * config.length**2
        odd -= BYTES[precision] * rows * config.length * shape_of(config).inner * shape_of(config).gated
    elif precision == "fp16" and upcasts(x_BTC):
        # On this path autograd saves v as a view of the q, k, v product: q and k stay with it, or v is there with them already.
        odd += BYTES[precision] * hidden * (-1 if config.attention.qk_norm else 2)
        # Products computed in fp32 by hand keep only the rounded softmax.
        odd -= 4 * rows * config.heads * config.length**2
    assert bytes_kept - odd == layer_activations(shape_of(config), rows, 1, precision)


def product_flops(x_shape, weight_shape, *rest, out_shape=None, **others) -> int:
    """oneDNN's product, which torch's counter does not know: a multiplication and an addition for each pair."""
    return 2 * math.prod(x_shape) * weight_shape[0]


@pytest.mark.parametrize("name", ["deepnorm geglu", "pre gelu"])
def test_flops_are_those_counted(name, monkeypatch):
    # torch's counter sees torch's products: the compiled kernel's are the same ones.
    monkeypatch.setattr("glm.precision.kernel.kernel", lambda: None)
    config = VARIANTS[name]
    model, (tokens_BT, *rest) = Transformer(config), batch(config, 3)
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: product_flops}
    )
    with counter:
        loss, _ = model.loss(tokens_BT, tokens_BT, *rest)
        loss.backward()
    # The first layer's input is an embedding, so every product has all three of its passes.
    assert counter.get_total_flops() == shape_of(config).model_flops(tokens_BT.numel())


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 1), (4, 4), (4, 16), (8, 3), (8, 24)])
def test_the_bubble_and_what_is_in_flight_are_those_of_the_schedule(stages, micro_batches):
    seconds, in_flight = one_forward_one_backward(stages, micro_batches, forward=1.0, backward=2.0)
    assert 1 - micro_batches * 3.0 / seconds == pytest.approx(bubble(stages, micro_batches), rel=1e-12)
    assert in_flight == [min(stages - stage, micro_batches) for stage in range(stages)]


def one_forward_one_backward(p: int, m: int, *, forward: float, backward: float) -> tuple[float, list[int]]:
    """Seconds of a simulated schedule, and the most micro-batches that each stage has between forward and backward."""
    orders = []
    for stage in range(p):
        warm = min(p - 1 - stage, m)
        order = [("F", i) for i in range(warm)]
        for i in range(m - warm):
            order += [("F", warm + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(m - warm, m)])
    done: dict[tuple[str, int, int], float] = {}
    free, at, open_now, most = [0.0] * p, [0] * p, [0] * p, [0] * p
    while any(at[stage] < len(orders[stage]) for stage in range(p)):
        ready: list[tuple[float, int]] = []
        for stage in range(p):
            if at[stage] == len(orders[stage]):
                continue
            kind, i = orders[stage][at[stage]]
            before = ("F", stage - 1, i) if kind == "F" else ("B", stage + 1, i)
            first = stage == 0 if kind == "F" else stage == p - 1
            if first or before in done:
                heapq.heappush(ready, (max(free[stage], 0.0 if first else done[before]), stage))
        begin, stage = heapq.heappop(ready)
        kind, i = orders[stage][at[stage]]
        free[stage] = done[kind, stage, i] = begin + (forward if kind == "F" else backward)
        open_now[stage] += 1 if kind == "F" else -1
        most[stage] = max(most[stage], open_now[stage])
        at[stage] += 1
    return max(free), most


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ring_all_reduce_sends_its_share(ranks):
    # Each of 2 (k - 1) rounds sends one of k chunks: the reduced sums, checked, say that the rounds are enough.
    data = [[float(rank * 10 + chunk) for chunk in range(ranks)] for rank in range(ranks)]
    expected = [sum(data[rank][chunk] for rank in range(ranks)) for chunk in range(ranks)]
    sent = 0
    for reduces in (True, False):
        for turn in range(ranks - 1):
            moves = [(rank, (rank - turn + (0 if reduces else 1)) % ranks) for rank in range(ranks)]
            values = [data[rank][chunk] for rank, chunk in moves]
            for (rank, chunk), value in zip(moves, values, strict=True):
                there = data[(rank + 1) % ranks]
                there[chunk] = there[chunk] + value if reduces else value
            sent += 1
    assert data == [expected] * ranks
    assert sent / ranks == ring_share(ranks)


def test_rings_leave_a_node_through_the_cards_of_their_members():
    cluster = parse_cluster("4x8xA100-40G")
    gpu = cluster.gpu
    assert group_rate(cluster, 8, 1) == gpu.link * TRANSFER
    assert group_rate(cluster, 2, 4) == gpu.link * TRANSFER
    assert group_rate(cluster, 8, 4) == 2 * gpu.network * TRANSFER
    assert group_rate(cluster, 4, 8) == gpu.network * TRANSFER


@pytest.mark.parametrize("layers", [1, 2, 7, 24, 70])
def test_stages_hold_all_layers(layers):
    for stages in range(1, layers + 1):
        counts = stage_layers(layers, stages)
        assert sum(counts) == layers
        assert len(counts) == stages
        assert max(counts) - min(counts) <= 2
    assert stage_layers(70, 8) == [8, 9, 9, 9, 9, 9, 9, 8]
    assert stage_layers(70, 7) == [10] * 7


def test_every_factorisation_is_tried():
    tried = {
        (layout.tensor, layout.pipeline, layout.data) for layout, _ in layouts(24, 24) if layout is not None
    }
    assert tried == {(t, p, 24 // (t * p)) for t in divisors(24) for p in divisors(24 // t)}
    found = search(shape_of(MODEL), parse_cluster("3x8xA100-40G"), 24)
    assert found.considered == sum(1 for _ in layouts(24, 24))
    assert all(plan.memory.total <= plan.layout.gpus * 40 * GIB for plan in found.plans)
    assert [plan.time.seconds for plan in found.plans] == sorted(plan.time.seconds for plan in found.plans)


def test_zero_divides_what_it_says():
    shape, gpu = shape_of(PRESETS["glm-1b"].model, vocabulary=50_000), parse_cluster("1x8xA100-40G").gpu
    by_stage = {
        zero: training_memory(shape, Layout(tensor=1, pipeline=1, data=8, zero=zero), 0, 8, gpu)
        for zero in range(4)
    }
    full = by_stage[0]
    assert (full.weights, full.gradients, full.optimizer) == tuple(
        size * shape.parameters for size in (2, 2, 12)
    )
    for zero, parts in ((1, (1, 8)), (2, (8, 8)), (3, (8, 8))):
        memory = by_stage[zero]
        divided = full.gradients / memory.gradients, full.optimizer / memory.optimizer
        assert divided == parts
        assert (memory.weights == full.weights) == (zero < 3)
    # Twice the embedding as it arrives, and the share of it that is sent.
    assert by_stage[3].weights == 2 * (2 + 1 / 8) * 50_000 * shape.hidden


def test_quantized_bytes_are_those_of_the_tensors():
    model = dataclasses.replace(MODEL, layers=2)
    expected = 0.0
    with torch.device("meta"):
        built = Transformer(model)
    for name, parameter in built.named_parameters():
        if name.startswith("layers") and parameter.dim() == 2:
            expected += parameter.numel() / 2 + 2 * parameter.shape[0]
        else:
            expected += 2 * parameter.numel()
    assert weight_bytes(shape_of(model), "int4") == expected
    assert weight_bytes(shape_of(model), "fp16") == 2 * shape_of(model).parameters


@pytest.mark.parametrize("between", [600.0, 3_600.0, 86_400.0])
@pytest.mark.parametrize("write", [1.0, 30.0, 300.0])
def test_dalys_interval_is_the_best(write, between):
    best = minimize_scalar(
        lambda tau: -goodput(tau, write, 60.0, between), bounds=(write / 100, 10 * between), method="bounded"
    )
    daly = goodput(daly_interval(write, between), write, 60.0, between)
    # Daly: within 0.2 % of the optimum for C < M / 2, the last case here is C = M / 2.
    assert daly == pytest.approx(-best.fun, rel=2e-3)
    assert daly_interval(write, between) < young_interval(write, between)


def test_goodput_is_that_of_simulated_failures():
    generator = np.random.default_rng(0)
    interval, write, restart, between = 600.0, 60.0, 120.0, 3_000.0
    walls = []
    for _ in range(4_000):
        wall, need = 0.0, interval + write
        while True:
            fails = generator.exponential(between)
            if fails >= need:
                wall += need
                break
            wall, need = wall + fails, interval + write + restart
        walls.append(wall)
    # A first segment has no restart before it, so this is Daly's sum without the restart's share of segments that did not fail.
    p = math.exp(-(interval + write) / between)
    first = between * (1 - p)
    again = between * (math.exp((interval + write + restart) / between) - 1)
    expected = first + (1 - p) * again
    error = 4 * np.std(walls) / math.sqrt(len(walls))
    assert abs(np.mean(walls) - expected) < error
    # Daly's form: e^(R/M) (e^((tau + C)/M) - 1) M is the same expectation, written as one.
    assert interval / goodput(interval, write, restart, between) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "text", ["", "96", "96x8", "x8xA100-40G", "96x8x", "0x8xA100-40G", "2x0xA100-40G", "2x8xQ100", "8xA100"]
)
def test_clusters_that_are_none(text):
    with pytest.raises(InputError, match="--gpus"):
        parse_cluster(text)


def test_clusters():
    assert str(parse_cluster("96x8xA100-40G")) == "96x8xA100-40G"
    assert str(parse_cluster("4xrtx3090")) == "1x4xRTX3090-24G"
    assert parse_cluster("2x8xh100").gpus == 16

"""Quantized linear layers beside their peers: time and error of one call, on the same weights and inputs, in one process.

    python -m experiments.benchmarks quantized_linear [--rounds 9] [--threads 1] [--json]

    scheme         peer
    mixed          bitsandbytes' Linear8bitLt, threshold 6, in evaluation mode (training on a CPU takes the weights alone in int8)
    w8a8-token     torchao's int8 dynamic activations, int8 weights
    int4           int4-g128-asym-mse: torchao's prototype int4 weight-only; both in groups of 64 where 128 does not
                   divide K, both by the same torch kernel on a CPU

Each layer gets its quicker format: int4 kernels take bf16, everything else fp32. Inputs have three channels 40 times as large as
the rest; the error is ||y - y64|| / ||y64|| against float64 products, also on inputs without such channels. All make their calls in
turn; figures are medians, and the median of the ratios within a turn. On one thread the time is the thread's time on its core, so
other work counts through caches alone. The benchmark skips peers that are not installed, with a line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from stabilitylab.quantization import QuantizedLinear, Scheme

SHAPES = ((576, 1536), (1536, 576), (2048, 8192))  # K, N
BATCHES = (1, 32, 256)
OUTLIERS, FACTOR = 3, 40
PAIRS = {
    "mixed": "bitsandbytes",
    "w8a8-token": "torchao int8 dynamic",
    "int4": "torchao prototype int4",
}
Call = Callable[[Tensor], Tensor]


def bitsandbytes_layer(weight: Tensor) -> Call:
    """LLM.int8() from its authors."""
    bnb: Any = importlib.import_module("bitsandbytes")
    rows, columns = weight.shape
    layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    call: Call = layer.to("cpu").eval()
    return call


def torchao_layer(weight: Tensor, config: Any) -> Call:
    """A linear layer through ``quantize_``."""
    quantize_ = importlib.import_module("torchao.quantization").quantize_
    holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    holder[0].weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(holder, config)
    return holder.eval()


def int4_group(weight: Tensor) -> int:
    """128, or 64 where the peer cannot take that."""
    return 128 if weight.shape[1] % 128 == 0 else 64


def torchao_int8(weight: Tensor) -> Call:
    config = importlib.import_module("torchao.quantization").Int8DynamicActivationInt8WeightConfig()
    return torchao_layer(weight, config)


def torchao_int4(weight: Tensor) -> Call:
    workflow = importlib.import_module("torchao.prototype.quantization.int4.inference_workflow")
    return torchao_layer(
        weight.bfloat16(), workflow.PrototypeInt4WeightOnlyConfig(group_size=int4_group(weight))
    )


PEERS: dict[str, Callable[[Tensor], Call]] = {
    "bitsandbytes": bitsandbytes_layer,
    "torchao int8 dynamic": torchao_int8,
    "torchao prototype int4": torchao_int4,
}


def contestants(weight: Tensor, tell: Callable[[str], None]) -> dict[str, Call]:
    """Everyone's layer with this weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    found: dict[str, Call] = {"fp32": linear}
    for name in (*PAIRS, "int8-row"):
        scheme = f"int4-g{int4_group(weight)}-asym-mse" if name == "int4" else name
        found[name] = QuantizedLinear.from_linear(linear, Scheme.parse(scheme))
    for name, make in PEERS.items():
        try:
            found[name] = make(weight)
        except ImportError as error:
            tell(f"{name} is left out: {error}")
    return found


def inputs(batch: int, columns: int, outliers: int) -> Tensor:
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
    x[:, torch.linspace(3, columns - 4, OUTLIERS).long()[:outliers]] *= FACTOR
    return x


def relative_error(call: Call, x: Tensor, weight: Tensor, dtype: torch.dtype) -> float:
    exact = x.double() @ weight.double().T
    return float((call(x.to(dtype)).double() - exact).norm() / exact.norm())


@torch.inference_mode()
def measure(
    columns: int, rows: int, batch: int, rounds: int, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One shape and batch: a row for each contestant."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    calls = contestants(weight, tell)
    formats = {name: torch.bfloat16 if "int4" in name else torch.float32 for name in calls}
    x = inputs(batch, columns, OUTLIERS)
    given = {dtype: x.to(dtype) for dtype in set(formats.values())}
    times: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for turn in range(rounds + 1):
        for name, call in calls.items():
            started = clock()
            call(given[formats[name]])
            if turn:
                times[name].append(clock() - started)
    found = []
    for name, call in calls.items():
        peer = PAIRS.get(name)
        ratio = None
        if peer in times:
            ratio = statistics.median(b / a for a, b in zip(times[name], times[peer], strict=True))
        found.append(
            {
                "shape": f"{columns} -> {rows}",
                "batch": batch,
                "layer": name,
                "ms": 1e3 * statistics.median(times[name]),
                "peer": peer if ratio is not None else None,
                "faster_than_peer": ratio,
                "error": relative_error(call, inputs(batch, columns, 0), weight, formats[name]),
                "error_outliers": relative_error(call, x, weight, formats[name]),
            }
        )
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="quantized_linear", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=9, help="calls of each layer; a third of it for the largest"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    console = Console(stderr=options.json)
    told: set[str] = set()

    def tell(line: str) -> None:
        if line not in told:
            told.add(line)
            console.print(line)

    found = []
    for columns, rows in SHAPES:
        for batch in BATCHES:
            heavy = columns * rows * batch > 1e9
            found += measure(
                columns, rows, batch, max(3, options.rounds // 3) if heavy else options.rounds, tell
            )
    if options.json:
        print(json.dumps({"threads": options.threads, "results": found}))
        return 0
    table = Table(
        "shape",
        "batch",
        "layer",
        "ms",
        "error",
        "outliers",
        "over peer",
        title=f"{options.threads} threads, medians",
    )
    for row in found:
        over = "" if row["peer"] is None else f"{row['faster_than_peer']:.2f}x"
        table.add_row(
            row["shape"], str(row["batch"]), row["layer"], f"{row['ms']:.2f}",
            f"{row['error']:.5f}", f"{row['error_outliers']:.5f}", over,
        )  # fmt: skip
    console.print(table)
    return 0

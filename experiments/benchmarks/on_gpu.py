"""Measurements on an accelerator: the monitor's cost, training levers, quantized layers, memory beside the plan, repeated bits.

    python -m experiments.benchmarks on_gpu [--parts monitor levers quantized memory repeats] [--rounds 20] [--out FILE]

Times count the device and the host together, from one synchronisation to the next, after a warm-up; contestants take turns within a
round. The benchmark prints medians over rounds, and medians of ratios within a round. Each batch has new random inputs.

    monitor    12 layers of 1024, 8 rows of 1,024 tokens, AdamW (fused): a step watched by everything, over one that is not, and ten
               steps of which one is measured over ten bare ones; fp32 (TF32 off), and bf16 by autocast
    levers     ``glm train``'s update of a model of 42M, one lever each, over the plain one, in bf16; tokens a second beside it
    quantized  a layer of 4096 x 4096 and 4096 x 11008 under a scheme over ``nn.Linear`` in bf16, and its error over float64
    memory     the most that torch holds during two updates, beside ``glm plan``'s count of tensors
    repeats    three updates twice from one state: whether losses and weights are the same to the last bit

The benchmark prints each part, and writes it to ``--out``, when it is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks._monitor_arms import GPT, VOCABULARY
from experiments.benchmarks._training_levers import LEVERS, PLAIN
from experiments.benchmarks.probe_cost import Nowhere
from glm.commands.train import parse_command
from glm.data.batch import Batch
from glm.errors import InputError
from glm.planning.hardware import GPUS, MIB
from glm.planning.layout import Layout
from glm.planning.memory import training_memory
from glm.planning.shape import shape_of
from glm.train.config import TrainConfig
from glm.train.engine import LocalEngine
from stabilitylab import Monitor
from stabilitylab.quantization import QuantizedLinear, Scheme

# 12 layers of 512, a gated feed-forward, a tied embedding of 8,192: 42M.
MEDIUM = (
    "glm-small --model.hidden 512 --model.heads 8 --model.vocabulary 8192 --model.length 1024 --batch.rows 16"
)
SCHEMES = {
    "w8a8-token": Scheme(share="row", activations="token"),
    "int8": Scheme(),
    "int4-g128": Scheme(bits=4, share=128),
}


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a piece of work, with all that it queues on the device."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------------ the monitor


def monitor(device: torch.device, rounds: int, *, layers: int, width: int, rows: int, length: int) -> Any:
    """Milliseconds and ratios by format."""
    found = {}
    for name in ("fp32", "bf16"):
        found[name] = _watched(
            device, rounds, name == "bf16", layers=layers, width=width, rows=rows, length=length
        )
        print(name, json.dumps(found[name]), flush=True)
    return found


def _watched(
    device: torch.device, rounds: int, half: bool, *, layers: int, width: int, rows: int, length: int
) -> dict[str, float]:
    def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = GPT(layers, width, width // 64).to(device)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    arms: dict[str, tuple[nn.Module, torch.optim.Optimizer, Monitor | None]] = {}
    for name, every in (("bare", None), ("off", 0), ("every step", 1), ("every 10", 10)):
        model, optimizer = trained()
        watch = (
            None
            if every is None
            else Monitor(model, optimizer, every=every, sinks=[Nowhere()], detector=None)
        )
        arms[name] = model, optimizer, watch
    steps = dict.fromkeys(arms, 0)

    def ten(name: str) -> None:
        model, optimizer, watch = arms[name]
        for _ in range(10):
            tokens_BT = torch.randint(VOCABULARY, (rows, length + 1), device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = model(tokens_BT[:, :-1])
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if watch is not None:
                watch.step(steps[name], loss=loss.detach())
            steps[name] += 1

    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, rounds):
        for name in arms:
            seconds = timed(lambda name=name: ten(name), device)  # type: ignore[misc]
            if number >= 0:
                taken[name].append(seconds / 10)
    memory = arms["every step"][2]
    assert memory is not None
    found = {f"{name} ms": 1e3 * statistics.median(one) for name, one in taken.items()}
    for name in list(arms)[1:]:
        ratios = [a / b for a, b in zip(taken[name], taken["bare"], strict=True)]
        found[f"{name} over bare"] = statistics.median(ratios)
    found["buffer MiB"] = memory.nbytes / MIB
    for _, _, watch in arms.values():
        if watch is not None:
            watch.close()
    return {name: round(value, 4) for name, value in found.items()}


# ------------------------------------------------------------------------------------------------------------- glm train


def config_of(words: str) -> TrainConfig:
    """The configuration of ``glm train`` with these words."""
    return parse_command([*words.split(), "--data", "unused", "--out", "unused"]).config


def random_batch(config: TrainConfig, seed: int) -> Batch:
    """Rows of one piece each, half of it context."""
    model, rows = config.model, config.batch.rows
    assert model.vocabulary is not None
    tokens_BT = torch.randint(
        model.vocabulary, (rows, model.length), generator=torch.Generator().manual_seed(seed)
    )
    position_T = torch.arange(model.length)
    two = model.attention.positions == "rope2d"
    positions = torch.stack((position_T, torch.zeros_like(position_T)), -1) if two else position_T
    context_T = position_T < model.length // 2
    targets_BT = torch.where(context_T, -100, tokens_BT.roll(-1, 1))
    return Batch(
        tokens_BT=tokens_BT,
        targets_BT=targets_BT,
        positions=positions.expand(rows, *positions.shape).contiguous(),
        segments_BT=torch.zeros(rows, model.length, dtype=torch.int32),
        context_BT=context_T.expand(rows, -1).contiguous(),
        provenance=(),
    )


def update(engine: LocalEngine, batch: Batch, number: int) -> float:
    """One update; its loss."""
    loss = engine.forward_backward(batch, number)
    engine.gradients()
    engine.update(1e-3, clip=1.0)
    return loss


def levers(device: torch.device, rounds: int, words: str) -> Any:
    """Milliseconds of an update by lever, over the plain one's, and tokens a second."""
    chosen = [PLAIN, *LEVERS, "fused"]
    flags = {**LEVERS, "fused": "--model.attention.softmax fused"}
    taken: dict[str, list[float]] = {}
    plain, rest = chosen[0], chosen[1:]
    found: dict[str, dict[str, float]] = {}
    config = config_of(f"{words} --precision bf16")
    base = LocalEngine(config, device)
    tokens = config.batch.rows * config.model.length
    for name in rest:
        try:
            other = config_of(f"{words} --precision bf16 {flags[name]}")
            engine = LocalEngine(other, device)
        except InputError as error:
            print(f"{name}: {error}", flush=True)
            continue
        taken = {plain: [], name: []}
        for number in range(-2, rounds):
            batch = random_batch(config, number + 2)
            for arm, one in ((plain, base), (name, engine)):
                seconds = timed(lambda one=one, batch=batch, at=number + 2: update(one, batch, at), device)  # type: ignore[misc]
                if number >= 0:
                    taken[arm].append(seconds)
        ratios = [a / b for a, b in zip(taken[name], taken[plain], strict=True)]
        found[name] = {
            "ms": round(1e3 * statistics.median(taken[name]), 3),
            "plain ms": round(1e3 * statistics.median(taken[plain]), 3),
            "over plain": round(statistics.median(ratios), 3),
            "tokens a second": round(tokens / statistics.median(taken[name])),
        }
        print(name, json.dumps(found[name]), flush=True)
        del engine
    found["parameters"] = {"all": sum(p.numel() for p in base.model.parameters())}
    return found


def memory(device: torch.device, words: str) -> Any:
    """Most MiB that torch held, and the plan's count, by precision and attention."""
    found: dict[str, dict[str, float]] = {}
    if device.type != "cuda":
        return found
    for precision in ("fp32", "fp16", "bf16"):
        for softmax in ("fp32", "fused"):
            for recompute in ("", " --model.recompute"):
                config = config_of(
                    f"{words} --precision {precision} --model.attention.softmax {softmax}{recompute}"
                )
                torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
                engine = LocalEngine(config, device)
                for number in range(2):
                    update(engine, random_batch(config, number), number)
                peak = torch.cuda.max_memory_allocated(device) - before
                del engine
                layout = Layout(
                    tensor=1, pipeline=1, data=1, micro=config.batch.micro, recompute=bool(recompute)
                )
                plan = training_memory(
                    shape_of(config.model), layout, 0, config.batch.rows, GPUS["H200-141G"], precision
                )
                name = f"{precision}, softmax {softmax}{', recomputed' * bool(recompute)}"
                counted = plan.total - plan.reserved
                found[name] = {
                    "peak MiB": round(peak / MIB, 1),
                    "plan MiB": round(counted / MIB, 1),
                    "plan over peak": round(counted / peak, 3),
                }
                print(name, json.dumps(found[name]), flush=True)
    return found


REPEATED = (
    "",
    "--model.attention.softmax fused",
    "--model.dropout 0.1",
    "--model.attention.positions learned",
    "--optimizer.kind muon",
    "--model.feed-forward.experts.count 4",
    "--model.norm-kind rms",
    "--model.recompute",
)


def repeats(device: torch.device, words: str) -> Any:
    """By precision and flags, whether two engines of one seed end in the same bits, else after how many updates they differ."""
    found: dict[str, Any] = {}
    for precision in ("fp32", "fp16", "bf16"):
        for more in REPEATED:
            config = config_of(f"{words} --precision {precision} {more}")
            ends = []
            for _ in range(2):
                engine = LocalEngine(config, device)
                losses = [update(engine, random_batch(config, number), number) for number in range(3)]
                ends.append((losses, {name: t.clone() for name, t in engine.tensors()[0].items()}))
                del engine
            (one, a), (other, b) = ends
            apart = [name for name in a if not torch.equal(a[name], b[name])]
            name = f"{precision} {more}".strip()
            found[name] = {"same losses": one == other, "same weights": not apart, "apart": apart[:3]}
            print(name, json.dumps(found[name]), flush=True)
    return found


# ------------------------------------------------------------------------------------------------------ quantized layers


def quantized(device: torch.device, rounds: int) -> Any:
    """Microseconds of a call by shape, scheme and rows, over ``nn.Linear``'s in bf16, and the error over float64."""
    found: dict[str, dict[str, float]] = {}
    for rows_out in (4096, 11008):
        weight = torch.randn(rows_out, 4096, generator=torch.Generator().manual_seed(0)).mul_(0.02)
        plain = nn.Linear(4096, rows_out, bias=False)
        plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
        calls: dict[str, nn.Module] = {"bf16": plain.to(device, torch.bfloat16)}
        for name, scheme in SCHEMES.items():
            layer = nn.Linear(4096, rows_out, bias=False)
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            calls[name] = QuantizedLinear.from_linear(layer, scheme).to(device)
        for count in (1, 32, 512, 4096):
            x = torch.randn(count, 4096, device=device, dtype=torch.bfloat16)
            exact = x.double() @ weight.to(device).double().T
            taken: dict[str, list[float]] = {name: [] for name in calls}
            for number in range(-2, rounds):
                for name, call in calls.items():
                    seconds = timed(lambda call=call, x=x: _several(call, x), device)  # type: ignore[misc]
                    if number >= 0:
                        taken[name].append(seconds / 20)
            for name, call in calls.items():
                y = call(x).double()
                ratios = [a / b for a, b in zip(taken[name], taken["bf16"], strict=True)]
                found[f"4096 -> {rows_out}, {count} rows, {name}"] = {
                    "us": round(1e6 * statistics.median(taken[name]), 1),
                    "over bf16": round(statistics.median(ratios), 3),
                    "error": round(float((y - exact).norm() / exact.norm()), 5),
                }
    return found


@torch.no_grad()
def _several(call: nn.Module, x: Tensor) -> None:
    for _ in range(20):
        call(x)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="experiments.benchmarks on_gpu", description=(__doc__ or "").split("\n")[0]
    )
    names = ("repeats", "monitor", "levers", "memory", "quantized")
    parser.add_argument("--parts", nargs="*", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes of a minute on a CPU: whether it runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(list(argv))
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("on_gpu needs a CUDA device; --device cpu --small shows that it runs")
    size = {"layers": 12, "width": 1024, "rows": 8, "length": 1024}
    words = MEDIUM
    if options.small:
        size = {"layers": 2, "width": 64, "rows": 2, "length": 16}
        words = "glm-tiny --model.layers 2 --model.hidden 32 --model.heads 2 --model.vocabulary 96 --model.length 32 --batch.rows 2"
    short = f"{words} --model.layers 2 --batch.rows 2" if not options.small else words
    work: Mapping[str, Callable[[], Any]] = {
        "repeats": lambda: repeats(device, short),
        "monitor": lambda: monitor(device, options.rounds, **size),
        "levers": lambda: levers(device, options.rounds, words),
        "memory": lambda: memory(device, words),
        "quantized": lambda: quantized(device, options.rounds),
    }
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }
    for part in options.parts:
        began = time.perf_counter()
        try:
            found[part] = work[part]()
        except Exception as error:  # the others are still worth having
            found[part] = {"error": f"{type(error).__name__}: {error}"}
        print(part, round(time.perf_counter() - began, 1), "s", json.dumps(found[part]), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0

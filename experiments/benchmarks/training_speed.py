"""How fast the stack trains: beside GPT-NeoX of equal size, memory per token, and where a step's time goes.

    --figure peer      tokens/s of ours and of HuggingFace transformers' GPT-NeoX, eager and compiled, and of GLM's own objective
    --figure memory    peak memory a token of both, and what recomputation saves (``_training_memory.py``)
    --figure builds    a step beside another build's (--former TREE) and GPT-NeoX's, in processor time (``_training_builds.py``);
                       with --against 'FLAGS' what a lever costs over the same step without it
    --figure levers    what each lever costs, all in turn in one process (``_training_levers.py``); --levers rms,muon: these
    --figure parts     time of data, forward and backward, gradients, update and monitor in our step

Peers make their steps in turn, over the same rows, so that a drifting machine moves all; figures are medians, and the median of the
ratios of neighbouring steps. ``_training_peer.py`` describes what it compares.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from experiments.benchmarks._training_builds import measure_builds, sized_words
from experiments.benchmarks._training_levers import measure_levers
from experiments.benchmarks._training_memory import memory
from experiments.benchmarks._training_peer import (
    Contestant,
    Size,
    contestant_step,
    flops,
    parameters_of,
    rows_of,
    variants,
)
from experiments.data import bilingual
from glm.commands.train import preset_config, with_vocabulary
from glm.data.loader import Loader
from glm.data.shards import open_data
from glm.train.config import TrainConfig
from glm.train.engine import LocalEngine
from stabilitylab import Monitor
from stabilitylab.command_line import parse


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Time training.

    Attributes:
        figure: what to measure; see the module.
        precision: compute format.
        steps: steps of each to time.
        seconds: peer: stop after this time, whatever the number of steps.
        threads: torch's threads.
        data: folder made by `glm shards`; by default the quick suite's.
        json: print one JSON object.
        size: peer and memory: size of the models.
        modes: peer: run as it is, compiled, or both.
        recompute: peer: time recomputation of activations as well.
        preset: parts and builds: a preset of `glm train`; builds: "" is a model of ``size`` by GPT-NeoX's recipe.
        rows: parts and builds: rows of an update.
        former: builds: tree of another build.
        against: builds: more flags of `glm train`, of this build alone.
        turns: builds: rounds, of ``steps`` steps each.
        levers: levers: names separated by commas; "": all. With ``preset``, ``rows`` or ``size``, and ``turns``.
        native: builds: use the processor's units for half formats, if it has any.
        every: parts: the monitor's cadence.
    """

    figure: Literal["peer", "memory", "parts", "builds", "levers"] = "peer"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    steps: int = 5
    seconds: float = 3600.0
    threads: int = 2
    data: Path | None = None
    json: bool = False
    size: Size = field(default_factory=Size)
    modes: Literal["eager", "compiled", "both"] = "both"
    recompute: bool = False
    preset: str = "glm-tiny"
    rows: int = 4
    every: int = 10
    former: Path | None = None
    against: str = ""
    levers: str = ""
    turns: int = 5
    native: bool = True


CONTESTANTS: tuple[Contestant, ...] = ("ours", "gpt-neox", "glm")
PARTS = ("data", "forward and backward", "gradients", "update")


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code."""
    settings: Settings = parse(Settings, arguments, program="python -m experiments.benchmarks training_speed")
    torch.set_num_threads(settings.threads)
    measure, show = {
        "peer": (measure_peer, show_peer),
        "memory": (measure_memory, show_memory),
        "parts": (measure_parts, show_parts),
        "builds": (measure_step, show_step),
        "levers": (measure_all_levers, show_levers),
    }[settings.figure]
    result = measure(settings)
    if settings.json:
        print(json.dumps({"settings": dataclasses.asdict(settings), **result}, default=str))
    else:
        show(settings, result, Console())
    return 0


def measure_peer(settings: Settings) -> dict[str, Any]:
    """Seconds of every step by contestant; tokens/s, FLOP/s and ratios of medians."""
    size, modes = settings.size, settings.modes
    contestants = {}
    for name, contestant, compiled, recompute in variants(
        compiled=modes != "eager", eager=modes != "compiled", recompute=settings.recompute
    ):
        model, step = contestant_step(
            contestant, size, settings.precision, settings.data, compiled=compiled, recompute=recompute
        )
        parameters = parameters_of(model)
        work = flops(size, parameters, tied=contestant == "glm", causal=contestant != "glm")
        contestants[name] = (parameters, work, step)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    deadline = time.perf_counter() + settings.seconds
    for number in range(-1, settings.steps):
        if number > 0 and time.perf_counter() > deadline:
            break
        for name, (_, _, step) in contestants.items():
            began = time.perf_counter()
            step(number + 1)
            if number >= 0:  # the first step allocates and compiles
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {}
    for name in contestants:
        mode = name.partition(", ")[2]
        peer = f"gpt-neox, {mode.partition(',')[0]}"
        if peer in seconds and name != peer:
            pairs = zip(seconds[peer], seconds[name], strict=True)
            ratios[name] = statistics.median(theirs / own for theirs, own in pairs)
    return {
        "seconds": seconds,
        "parameters": {name: parameters for name, (parameters, _, _) in contestants.items()},
        "tokens_per_second": {name: size.rows * size.length / s for name, s in medians.items()},
        "gflops": {name: contestants[name][1] / s / 1e9 for name, s in medians.items()},
        "ratio_to_peer": ratios,
    }


def show_peer(settings: Settings, result: dict[str, Any], console: Console) -> None:
    size = settings.size
    table = Table(
        *("", "parameters", "tokens/s", "GFLOP/s", "times the peer's speed"),
        title=f"{size.layers} layers of {size.hidden}, vocabulary {size.vocabulary:,}, {size.rows} rows of {size.length}, "
        f"{settings.precision}, {settings.threads} threads, median of {len(next(iter(result['seconds'].values())))}",
    )
    for name, speed in result["tokens_per_second"].items():
        ratio = result["ratio_to_peer"].get(name)
        table.add_row(
            name,
            f"{result['parameters'][name] / 1e6:.2f}M",
            f"{speed:,.0f}",
            f"{result['gflops'][name]:.0f}",
            f"{ratio:.2f}" if ratio else "",
        )
    console.print(table)


def measure_memory(settings: Settings) -> dict[str, Any]:
    """Peak memory by contestant, as it is and with recomputation."""
    rows_of(settings.size, "glm", settings.data)  # wrong data fail here, not in a child
    return {
        f"{contestant}{', recomputed' if recompute else ''}": memory(
            contestant, settings.size, settings.precision, settings.data, recompute=recompute
        )
        for recompute in (False, True)
        for contestant in CONTESTANTS
    }


def show_memory(settings: Settings, result: dict[str, Any], console: Console) -> None:
    table = Table("", "peak, MB", "kB a token", title=f"{settings.precision}, {settings.size}")
    for name, found in result.items():
        table.add_row(name, f"{found['peak'] / 1e6:,.0f}", f"{found['bytes_per_token'] / 1e3:,.1f}")
    console.print(table)


def show_parts(settings: Settings, result: dict[str, Any], console: Console) -> None:
    table = Table(
        "part",
        "ms, median",
        "share",
        title=f"{settings.preset}, {settings.precision}, {settings.threads} thread",
    )
    for part in PARTS:
        table.add_row(part, f"{result['ms'][part]:.1f}", f"{result['share'][part]:.1%}")
    table.add_row("whole step, no monitor", f"{result['ms']['step']:.1f}", "100%")
    table.add_row(f"whole step, monitor every {settings.every}", f"{result['ms']['monitored step']:.1f}", "")
    console.print(table)
    console.print(
        f"{result['tokens_per_second']:,.0f} tokens/s; the monitor adds {result['monitor_overhead']:+.1%} to the mean step"
    )


def measure_parts(settings: Settings) -> dict[str, Any]:
    """Median milliseconds of each part, their shares, tokens a second, the monitor's overhead."""
    data = open_data(settings.data or bilingual(Path("data") / "bilingual"))
    config = with_vocabulary(preset_config(settings.preset), data)
    config = dataclasses.replace(
        config, precision=settings.precision, batch=dataclasses.replace(config.batch, rows=settings.rows)
    )
    loader = Loader(data, config.objective, config.sampling, length=config.model.length, seed=0)
    bare, watched = LocalEngine(config), LocalEngine(config)
    times: dict[str, list[float]] = {part: [] for part in (*PARTS, "step", "monitored step")}
    with TemporaryDirectory() as folder:
        monitor = Monitor(
            watched.model,
            watched.optimizer,
            parameters=watched.tensors()[0],
            out=Path(folder) / "run",
            every=settings.every,
            gradients_every=1,
        )
        with monitor:
            for step in range(-3, settings.steps):
                parts = timed_step(config, bare, loader, step + 3, None)
                monitored = sum(timed_step(config, watched, loader, step + 3, monitor).values())
                if step >= 0:  # the first steps allocate
                    for part, seconds in parts.items():
                        times[part].append(seconds)
                    times["step"].append(sum(parts.values()))
                    times["monitored step"].append(monitored)
    ms = {part: 1e3 * statistics.median(seconds) for part, seconds in times.items()}
    return {
        "ms": ms,
        "share": {part: ms[part] / sum(ms[p] for p in PARTS) for part in PARTS},
        "tokens_per_second": settings.rows * config.model.length / (ms["step"] / 1e3),
        # Means: a monitor that measures every tenth step would not show in a median at all.
        "monitor_overhead": statistics.fmean(times["monitored step"]) / statistics.fmean(times["step"]) - 1,
    }


def measure_step(settings: Settings) -> dict[str, Any]:
    """A step of this build beside another's and the peer's."""
    words = [settings.preset, "--batch.rows", str(settings.rows)] if settings.preset else None
    size = settings.size
    if words is not None:
        size = dataclasses.replace(
            size, length=preset_config(settings.preset).model.length, rows=settings.rows
        )
    return measure_builds(
        words=words,
        size=size,
        precision=settings.precision,
        former=settings.former,
        data=settings.data or bilingual(Path("data") / "bilingual"),
        rounds=settings.turns,
        steps=settings.steps,
        native=settings.native,
        against=shlex.split(settings.against),
    )


def show_step(settings: Settings, result: dict[str, Any], console: Console) -> None:
    units = "" if settings.native else ", without half units"
    title = f"{settings.preset or settings.size} {settings.against}, {settings.precision}{units}"
    table = Table("", "ms a step", "tokens/s", "over now", "last loss", title=title)
    for name, ms in result["ms"].items():
        over = result["over_now"].get(name)
        table.add_row(
            name,
            f"{ms:.1f}",
            f"{1e3 * result['tokens'] / ms:,.0f}",
            f"{over:.3f}" if over else "",
            f"{result['loss'].get(name, float('nan')):.6f}",
        )
    console.print(table)


def measure_all_levers(settings: Settings) -> dict[str, Any]:
    """A step with each lever beside the plain one."""
    words = sized_words(settings.size)
    if settings.preset:
        words = [settings.preset, "--batch.rows", str(settings.rows)]
    return measure_levers(
        [*words, "--precision", settings.precision],
        [name for name in settings.levers.split(",") if name],
        data=settings.data or bilingual(Path("data") / "bilingual"),
        rounds=settings.turns,
    )


def show_levers(settings: Settings, result: dict[str, Any], console: Console) -> None:
    table = Table(
        *("", "ms a step", "over the plain step"),
        title=f"{settings.preset or settings.size}, {settings.precision}, {result['tokens']:,} tokens",
    )
    for name, ms in result["ms"].items():
        table.add_row(name, f"{ms:.1f}", f"{result['over_plain'][name]:.3f}")
    console.print(table)


def timed_step(
    config: TrainConfig, engine: LocalEngine, loader: Loader, step: int, monitor: Monitor | None
) -> dict[str, float]:
    """One step as in the training loop; seconds of each part, with the monitor's work in the parts that it interrupts."""
    marks = [time.perf_counter()]
    batch = loader.batch(step, config.batch.rows)
    marks.append(time.perf_counter())
    loss = engine.forward_backward(batch, step)
    marks.append(time.perf_counter())
    summary = engine.gradients()
    if monitor is not None:
        monitor.gradients_ready(gradients=summary.gradients, norms=summary.norms)
    marks.append(time.perf_counter())
    engine.update(config.schedule.learning_rate(step, config.steps), clip=config.optimizer.clip)
    if monitor is not None:
        monitor.step(step, loss=loss, gradient_norm=summary.global_norm)
    marks.append(time.perf_counter())
    return dict(zip(PARTS, (b - a for a, b in pairwise(marks)), strict=True))

"""What a monitor costs: mean step time with it over without it, beside the other monitors at the same cadence.

Every arm trains its own copy of one GPT (pre-norm, tied embedding, AdamW, fp32) on the same random tokens, in a process of its own
and on one thread. Arms take turns of ``--steps`` steps, in an order drawn anew every round. The benchmark divides a turn's time by
the bare model's in the same round and reports the median over rounds, so that other work on the machine disturbs both sides of a
ratio. A process is faster or slower than its twin by some percent as long as it lives, so all start anew ``--restarts`` times.
``low`` and ``high`` bound the median with 95 % (bootstrap over restarts and rounds). ``bare again`` is a second bare process: it
shows the error of the measurement itself. ``wall`` is the training thread's time. ``processor`` is the time of all threads of the
process until the monitor has caught up, so it includes work put off to a thread; it leaves out wandb's writing, which happens in a
process of its own. ``close`` is the processor time at the end of a run.

    python -m experiments.benchmarks monitor_overhead [--model small|large] [--rounds 12] [--paired | --depth] [--json]

Small: 4 layers, width 128, batch 8 x 128 tokens. Large: 8 layers, width 512, batch 4 x 128. The peers are optional: ``pip install
trainscope==1.8.1 mindstudio-probe==26.2.0 nvdlfw-inspect==0.2.2 wandb``; those not installed are left out. ``--paired`` measures
ours alone, on a machine that is not quiet: ``--rounds`` pairs of steps of one process, one of them measured; ``--depth`` the same
from 4 to 96 layers of width 64.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from experiments.benchmarks._monitor_arms import (
    BARE,
    BARE_AGAIN,
    GPT,
    OURS,
    TOKENS,
    VOCABULARY,
    Ours,
    Spec,
    installed,
    train_step,
    work,
)
from experiments.benchmarks._monitor_peers import PACKAGES
from experiments.statistics import median_interval

GRADIENTS, SELDOM, EVERY = "gradients", "every-10", "every-step"
SUITES = {
    GRADIENTS: "gradients of every parameter, every step",
    SELDOM: "everything, every 10 steps",
    EVERY: "everything, every step",
}
SIZES = {"small": ((4, 128, 4), 8), "large": ((8, 512, 8), 4)}
CADENCE = {GRADIENTS: 1, SELDOM: 10, EVERY: 1}
# Flushes and measured steps of a warmed-up run then fall inside turns and not on their ends.
WARM_UP = 15

Times = dict[str, list[tuple[float, float]]]


def take_turns(specs: Sequence[Spec], rounds: int, steps: int) -> tuple[Times, dict[str, dict[str, float]]]:
    """Wall and processor seconds a step, [rounds], of each arm; and each one's last answer."""
    context = multiprocessing.get_context("spawn")
    order = random.Random(0)
    lines: dict[str, Connection] = {}
    processes = []
    for spec in specs:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, spec), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        lines[spec.name] = here
    for here in lines.values():
        here.recv()
    times: Times = {spec.name: [] for spec in specs}
    for turn in range(rounds + 1):
        names = list(lines)
        order.shuffle(names)
        for name in names:
            lines[name].send(WARM_UP if turn == 0 else steps)
            took = lines[name].recv()
            if turn:
                times[name].append(took)
    ends = {}
    for name, line in lines.items():
        line.send(0)
        ends[name] = line.recv()
    for process in processes:
        process.join()
    return times, ends


def measure(
    names: Sequence[str],
    suite: str,
    shape: tuple[int, int, int],
    rows: int,
    rounds: int,
    steps: int,
    restarts: int,
) -> dict[str, dict[str, float]]:
    """Percent over the arm ``bare`` for each arm, and what else there is to tell of it."""
    times: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in (BARE, *names)}
    ends: dict[str, dict[str, float]] = {}
    for _ in range(restarts):
        with tempfile.TemporaryDirectory() as scratch:
            specs = [
                Spec(
                    name=name,
                    every=CADENCE[suite],
                    modules=suite != GRADIENTS,
                    shape=shape,
                    rows=rows,
                    folder=Path(scratch) / str(i),
                )
                for i, name in enumerate((BARE, *names))
            ]
            some, ends = take_turns(specs, rounds, steps)
        for name, taken in some.items():
            times[name].append(taken)
    bare = np.array(times[BARE])
    found = {}
    for name, by_restart in times.items():
        mine = np.array(by_restart)  # [restarts, rounds, 2]
        wall, processor = np.moveaxis(100 * (mine / bare - 1), -1, 0)
        low, high = median_interval(wall)
        row = {"wall %": np.median(wall), "low": low, "high": high, "processor %": np.median(processor)}
        row |= {"step ms": 1e3 * np.median(mine[..., 0]), "close s": ends[name]["close"]}
        row["peak MiB"] = ends[name]["peak MiB"]
        if "memory %" in ends[name]:
            row["memory %"] = ends[name]["memory %"]
        found[name] = {key: round(float(value), 2) for key, value in row.items()}
    return found


def arms(suite: str, with_peers: bool) -> list[str]:
    """The arms to compare with the bare model."""
    ours = ["attached but off", "ours"] if suite == GRADIENTS else list(OURS)
    return [BARE_AGAIN, *ours] + (installed() if with_peers else [])


def paired(shape: tuple[int, int, int], rows: int, pairs: int, *, gradients_only: bool) -> dict[str, float]:
    """One process, one model, every second step measured: processor time of the training thread in a measured step over that in the
    step after it. Other work on the machine disturbs both."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(*shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = torch.randint(VOCABULARY, (16, rows, TOKENS + 1))
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(model, optimizer, 2, Path(folder), gradients_only=gradients_only)
        for step in range(2 * pairs + 4):
            began = time.thread_time()
            train_step(step, batches[step % 16], model, optimizer, ours)
            taken.append(time.thread_time() - began)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        memory = 100 * ours.monitor.nbytes / (4 * size)
        ours.close()
    measured, bare = np.array(taken[4:]).reshape(-1, 2).T
    low, middle, high = np.percentile(100 * (measured / bare - 1), (25, 50, 75))
    found = {"processor %": middle, "low": low, "high": high, "memory %": memory}
    found["us a layer"] = 1e6 * float(np.median(measured - bare)) / shape[0]
    return {key: round(float(value), 2) for key, value in found.items()}


def pairs(count: int) -> dict[str, dict[str, float]]:
    """Gradients alone, and everything, of both models."""
    found = {}
    for name, (shape, rows) in SIZES.items():
        for what, alone in (("gradients", True), ("everything", False)):
            some = count if name == "small" else max(4, count // 4)
            found[f"{what}, {name}"] = paired(shape, rows, some, gradients_only=alone)
    return found


def depth(count: int) -> dict[str, dict[str, float]]:
    """Everything, by number of layers, of width 64."""
    return {
        f"{layers} layers": paired((layers, 64, 2), 2, count, gradients_only=False)
        for layers in (4, 16, 48, 96)
    }


def show(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """One table a suite."""
    for suite, rows in found.items():
        table = Table(title=SUITES.get(suite, suite))
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        for column in ("arm", *columns):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for name, row in rows.items():
            table.add_row(name, *(f"{row[key]:g}" if key in row else "" for key in columns))
        Console().print(table)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="experiments.benchmarks monitor_overhead", description=__doc__)
    parser.add_argument("--model", choices=tuple(SIZES), default="small")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--restarts", type=int, default=1, help="times that every process is started anew")
    parser.add_argument("--steps", type=int, default=10, help="steps a turn; a multiple of 10")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--without", nargs="*", choices=tuple(PACKAGES), default=(), help="peers left out")
    parser.add_argument("--paired", action="store_true", help="ours alone, within one process")
    parser.add_argument("--depth", action="store_true", help="the same, by number of layers")
    parser.add_argument("--suite", choices=tuple(SUITES), help="one comparison alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(list(argv))
    found: dict[str, dict[str, dict[str, float]]] = {}
    missing = (
        [] if options.no_peers or options.depth or options.paired else sorted(PACKAGES.keys() - installed())
    )
    if options.depth:
        found["everything, a measured step over the one after it"] = depth(options.rounds)
    elif options.paired:
        found["a measured step over the one after it"] = pairs(options.rounds)
    else:
        shape, rows = SIZES[options.model]
        for suite in SUITES:
            if options.suite in (None, suite):
                names = [arm for arm in arms(suite, not options.no_peers) if arm not in options.without]
                found[suite] = measure(
                    names, suite, shape, rows, options.rounds, options.steps, options.restarts
                )
    if options.json:
        print(json.dumps(found))
    else:
        show(found)
        if missing:
            print(f"not installed, left out: {', '.join(missing)}")
    return 0

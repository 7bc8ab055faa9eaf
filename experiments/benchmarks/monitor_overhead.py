"""What a monitor costs: mean step time with it over without it, beside the other monitors at the same
cadence.

Every arm trains its own copy of one GPT (pre-norm, tied embedding, AdamW, fp32) on the same random tokens.
Arms take turns of ``--steps`` steps; a turn's time is divided by the bare model's in the same round, and the
median over rounds is reported, with the quartiles: neighbours on a shared machine then disturb both sides of
a ratio. Wall time, and processor time of this process with all its threads, so that work put off to a thread
is counted.

    python -m experiments.benchmarks monitor_overhead [--model small|large] [--rounds 12] [--depth] [--json]

Small: 4 layers, width 128, batch 8 x 128 tokens. Large: 8 layers, width 512, batch 4 x 128. The peers are
optional: ``pip install trainscope==1.8.1 mindstudio-probe==26.2.0 nvdlfw-inspect==0.2.2 wandb``; those not
installed are left out. ``--depth`` measures instead the cost a layer from 4 to 96 layers of width 64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention

from experiments.benchmarks._monitor_peers import Peer, peers, quiet
from stabilitylab import Monitor
from stabilitylab.probes.gradients import GradientProbe

VOCABULARY = 2048
TOKENS = 128


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.activation = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.GELU(),
        )
        self.heads = heads

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (
            self.query_key_value(self.attention_norm(x_BTD))
            .view(B, T, 3, self.heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.output(y.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(self.activation(self.up(self.feed_forward_norm(x_BTD))))


class GPT(nn.Module):
    """Tokens [B, T] to logits [B, T, V]."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return linear(self.final_norm(x_BTD), self.embedding.weight)


class Ours(Peer):
    """This project's monitor writing a run folder, without or with TensorBoard; ``every`` 0: attached but
    off."""

    def __init__(self, *args: object, gradients_only: bool = False, tensorboard: bool = False) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.monitor = Monitor(
            self.model,
            self.optimizer,
            out=self.folder / "run",
            every=self.every,
            probes=[GradientProbe()] if gradients_only else None,
            tensorboard=tensorboard,
        )

    def after_backward(self, step: int, loss: Tensor) -> None:
        self.monitor.gradients_ready()

    def after_step(self, step: int, loss: Tensor) -> None:
        self.monitor.step(step, loss=loss)

    def close(self) -> None:
        self.monitor.close()


@dataclass
class Arm:
    """A model in training, perhaps with a monitor, and its times a step, [rounds]."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    peer: Peer | None
    step: int
    wall: list[float]
    processor: list[float]

    def turn(self, batches: Sequence[Tensor], steps: int, *, timed: bool = True) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            tokens = batches[self.step % len(batches)]
            loss = cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            if self.peer is not None:
                self.peer.after_backward(self.step, loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.peer is not None:
                self.peer.after_step(self.step, loss)
            self.step += 1
        if timed:
            self.wall.append((time.perf_counter() - wall) / steps)
            self.processor.append((time.process_time() - processor) / steps)


Make = Callable[..., Peer] | None


def arm(shape: tuple[int, int, int], make: Callable[..., Peer] | None, every: int, folder: Path) -> Arm:
    torch.manual_seed(0)
    model = GPT(*shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    folder.mkdir()
    peer = make(model, optimizer, every, folder) if make is not None else None
    return Arm(model, optimizer, peer, 0, [], [])


def measure(
    arms: dict[str, tuple[Make, int]],
    shape: tuple[int, int, int],
    rows: int,
    rounds: int,
    steps: int,
) -> dict[str, dict[str, float]]:
    """Percent over the arm ``bare`` for each other arm: median and quartiles of wall time, median of
    processor time."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(VOCABULARY, (rows, TOKENS + 1), generator=generator) for _ in range(16)]
    with tempfile.TemporaryDirectory() as scratch, quiet():
        running = {}
        for i, (name, (make, every)) in enumerate(arms.items()):
            running[name] = arm(shape, make, every, Path(scratch) / str(i))
            running[name].turn(batches, steps, timed=False)
        for _ in range(rounds):
            for one in running.values():
                one.turn(batches, steps)
        found = {}
        for name, one in running.items():
            wall, processor = (
                100 * (np.array(mine) / np.array(bare) - 1)
                for mine, bare in (
                    (one.wall, running["bare"].wall),
                    (one.processor, running["bare"].processor),
                )
            )
            low, middle, high = np.percentile(wall, (25, 50, 75))
            found[name] = {"wall %": middle, "wall % low": low, "wall % high": high}
            found[name] |= {
                "processor %": float(np.median(processor)),
                "step ms": 1e3 * float(np.median(one.wall)),
            }
            if isinstance(one.peer, Ours):
                size = sum(p.numel() * p.element_size() for p in one.model.parameters())
                # Weights, gradients and AdamW's two moments.
                found[name]["memory % of training state"] = 100 * one.peer.monitor.nbytes / (4 * size)
        for one in running.values():
            if one.peer is not None:
                one.peer.close()
    return {name: {key: round(float(value), 2) for key, value in row.items()} for name, row in found.items()}


GRADIENTS, SELDOM, EVERY = (
    "gradients of every parameter, every step",
    "everything, every 10 steps",
    "everything, every step",
)
CADENCE = {GRADIENTS: 1, SELDOM: 10, EVERY: 1}


def ours(suite: str) -> dict[str, tuple[Make, int]]:
    """Our arms of a suite: name -> (monitor, cadence)."""

    def gradients(*args: object) -> Peer:
        return Ours(*args, gradients_only=True)

    def with_tensorboard(*args: object) -> Peer:
        return Ours(*args, tensorboard=True)

    if suite == GRADIENTS:
        return {"attached but off": (Ours, 0), "ours": (gradients, 1)}
    return {"ours": (Ours, CADENCE[suite]), "ours, with TensorBoard": (with_tensorboard, CADENCE[suite])}


def compare(suite: str, only: str | None, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """A suite's arms; with ``only``, that peer alone beside the bare model."""
    shape, rows = ((4, 128, 4), 8) if options.model == "small" else ((8, 512, 8), 4)
    arms: dict[str, tuple[Make, int]] = {"bare": (None, 0)}
    if only is None:
        arms |= ours(suite)
    else:
        arms[only] = peers(CADENCE[suite], suite != GRADIENTS)[only], CADENCE[suite]
    return measure(arms, shape, rows, options.rounds, options.steps)


def compare_peer(suite: str, peer: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """A peer in a process of its own: some of them change torch for everybody in theirs."""
    command = [sys.executable, "-m", "experiments.benchmarks", "monitor_overhead", "--json", "--suite", suite]
    command += [
        "--peer",
        peer,
        "--model",
        options.model,
        "--rounds",
        str(options.rounds),
        "--steps",
        str(options.steps),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])[suite]
    return {peer: found[peer]}


def depth(rounds: int) -> dict[str, dict[str, float]]:
    """Cost of everything every step, microseconds a layer, by number of layers."""
    found = {}
    for layers in (4, 16, 48, 96):
        arms: dict[str, tuple[Make, int]] = {"bare": (None, 0), "ours": (Ours, 1)}
        row = measure(arms, (layers, 64, 2), 2, rounds, 4)
        cost = row["ours"]["step ms"] - row["bare"]["step ms"]
        found[f"{layers} layers"] = {
            "us a layer": round(1e3 * cost / layers, 1),
            "wall %": row["ours"]["wall %"],
        }
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="experiments.benchmarks monitor_overhead", description=__doc__)
    parser.add_argument("--model", choices=("small", "large"), default="small")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10, help="steps a turn; a multiple of 10")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--depth", action="store_true", help="cost a layer instead")
    parser.add_argument("--suite", choices=tuple(CADENCE), help="one comparison alone")
    parser.add_argument("--peer", help="with --suite: this peer alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    if options.depth:
        found["depth"] = depth(options.rounds)
    else:
        for suite, cadence in CADENCE.items():
            if options.suite in (None, suite):
                found[suite] = compare(suite, options.peer, options)
                if options.peer is None and not options.no_peers:
                    for peer in peers(cadence, suite != GRADIENTS):
                        found[suite] |= compare_peer(suite, peer, options)
    if options.json:
        print(json.dumps(found))
        return 0
    for suite, table_rows in found.items():
        table = Table(title=suite)
        columns = list(dict.fromkeys(key for row in table_rows.values() for key in row))
        for column in ("arm", *columns):
            table.add_column(column)
        for name, row in table_rows.items():
            table.add_row(name, *(f"{row[key]:g}" if key in row else "" for key in columns))
        Console().print(table)
    return 0

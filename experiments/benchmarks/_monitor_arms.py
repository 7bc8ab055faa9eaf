"""One arm of the benchmark of monitors: a small GPT that trains in its own process, perhaps watched.

Each arm has a process: some monitors change torch for their whole process, and an arm must pay for its own monitor's threads alone.
The parent says when to take a turn of some steps; the answer is the wall time of the steps, and the processor time of the whole
process until its monitor has nothing left to do.
"""

from __future__ import annotations

import importlib.util
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention

from experiments.benchmarks._monitor_peers import PACKAGES, Peer, peers, quiet
from stabilitylab import Monitor
from stabilitylab.probes.gradients import GradientProbe

VOCABULARY = 2048
TOKENS = 128


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation, self.heads = nn.GELU(), heads

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.query_key_value(self.attention_norm(x_BTD)).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.output(y.transpose(1, 2).reshape(B, T, D))
        fed_BTD: Tensor = self.down(self.activation(self.up(self.feed_forward_norm(x_BTD))))
        return x_BTD + fed_BTD


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
    """This project's monitor writing a run folder; ``every`` 0: attached but off."""

    def __init__(self, *args: Any, gradients_only: bool = False, tensorboard: bool = False) -> None:
        super().__init__(*args)
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

    def settle(self) -> None:
        while self.monitor.backlog:
            time.sleep(1e-3)

    def close(self) -> None:
        self.monitor.close()


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The model to train, and its monitor.

    Args:
        name: of the arm: ``bare`` (twice), one of ours, or a peer's.
        every: measure every n-th step.
        modules: whether to measure activations too, or gradients alone.
        shape: layers, width, heads.
        rows: of a batch.
        folder: the arm's own.
    """

    name: str
    every: int
    modules: bool
    shape: tuple[int, int, int]
    rows: int
    folder: Path


BARE, BARE_AGAIN = "bare", "bare again"
OURS = {"ours": False, "ours, with TensorBoard": True}


def installed() -> list[str]:
    """The importable peers."""
    return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]


def work(connection: Connection, spec: Spec) -> None:
    """The arm's process: takes turns until the parent asks for 0 steps, then closes and answers with the rest."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with quiet():
        model = GPT(*spec.shape)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        spec.folder.mkdir()
        peer = _peer(spec, model, optimizer)
        generator = torch.Generator().manual_seed(0)
        batches = torch.randint(VOCABULARY, (16, spec.rows, TOKENS + 1), generator=generator)
        connection.send(None)
        step = 0
        while steps := connection.recv():
            began, busy = time.perf_counter(), time.process_time()
            for _ in range(steps):
                train_step(step, batches[step % 16], model, optimizer, peer)
                step += 1
            took = time.perf_counter() - began
            peer.settle()
            connection.send((took / steps, (time.process_time() - busy) / steps))
        busy = time.process_time()
        peer.close()
        found = {"close": time.process_time() - busy}
        found["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if isinstance(peer, Ours):
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            # Weights, gradients and AdamW's two moments.
            found["memory %"] = 100 * peer.monitor.nbytes / (4 * size)
        connection.send(found)


def train_step(
    step: int, tokens: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, peer: Peer
) -> None:
    """One step of training, watched by ``peer``."""
    loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    peer.after_backward(step, loss)
    optimizer.step()
    optimizer.zero_grad()
    peer.after_step(step, loss)


def _peer(spec: Spec, model: nn.Module, optimizer: torch.optim.Optimizer) -> Peer:
    make: Callable[..., Peer] = Peer
    if spec.name == "attached but off":
        return Ours(model, optimizer, 0, spec.folder)
    if spec.name in OURS:
        tensorboard, alone = OURS[spec.name], not spec.modules
        return Ours(model, optimizer, spec.every, spec.folder, gradients_only=alone, tensorboard=tensorboard)
    if spec.name not in (BARE, BARE_AGAIN):
        make = peers(spec.modules)[spec.name]
    return make(model, optimizer, spec.every, spec.folder)

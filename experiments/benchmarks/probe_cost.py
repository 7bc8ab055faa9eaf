"""What the probes `weights`, `formats` (every 10 steps) and `curvature` (every 50) add to a small model's training.

    python -m experiments.benchmarks probe_cost [--rounds 20] [--probes formats] [--json]

A GPT of 6 layers of 256 trains with only the probe watching. A measured step and the unmeasured one after it make a pair; its
difference, over the time of a step and over the cadence, is the cost. Processor time, median over pairs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.benchmarks._monitor_arms import GPT, TOKENS, VOCABULARY
from stabilitylab import Monitor, Schedule
from stabilitylab.probes.base import Probe
from stabilitylab.probes.curvature import CurvatureProbe
from stabilitylab.probes.formats import FormatProbe
from stabilitylab.probes.weights import WeightProbe

SHAPE, ROWS = (6, 256, 4), 4
CADENCE = {"weights": 10, "formats": 10, "curvature": 50}


class Nowhere:
    """A sink that keeps nothing: the benchmark times measuring, not writing."""

    def write(self, samples: object, events: object) -> None:
        """Drop everything."""

    def close(self) -> None:
        """Nothing is open."""


def measure(name: str, rounds: int) -> dict[str, float]:
    """Milliseconds of a step, additional ones of a measured step, and percent at the cadence."""
    torch.manual_seed(0)
    model = GPT(*SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS + 1))
    loss = _loss(model, tokens)
    made: dict[str, Callable[[], Probe]] = {
        "weights": WeightProbe,
        "formats": FormatProbe,
        "curvature": lambda: CurvatureProbe(lambda: torch.autograd.backward(loss())),
    }
    probe = made[name]()
    schedule, sink = Schedule(every=0, probes={name: 2}, dense_steps=0), Nowhere()
    seconds = []
    with Monitor(model, optimizer, probes=[probe], schedule=schedule, sinks=[sink], detector=None) as monitor:
        for step in range(2 * rounds + 4):
            began = time.process_time()
            torch.autograd.backward(loss())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
            seconds.append(time.process_time() - began)
    pairs = np.array(seconds[4:]).reshape(-1, 2)
    bare, more = float(np.median(pairs[:, 1])), float(np.median(pairs[:, 0] - pairs[:, 1]))
    return {
        "step ms": 1e3 * bare,
        "more ms": 1e3 * more,
        f"percent, every {CADENCE[name]}": 100 * more / bare / CADENCE[name],
    }


def _loss(model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    return lambda: cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def main(argv: Sequence[str]) -> int:
    """Measure each and print."""
    parser = argparse.ArgumentParser(prog="experiments.benchmarks probe_cost")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--probes", nargs="+", choices=tuple(CADENCE), default=tuple(CADENCE))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    found = {name: measure(name, asked.rounds) for name in asked.probes}
    if asked.json:
        print(json.dumps(found))
    for name, of in found.items() if not asked.json else ():
        print(f"{name}: {', '.join(f'{key} {value:.2f}' for key, value in of.items())}")
    return 0

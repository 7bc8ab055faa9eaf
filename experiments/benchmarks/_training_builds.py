"""Alternates steps of this build, of another one, and of GPT-NeoX, in processor time.

Each build has its own process (``_build_worker``). With a preset both train that. Without one they train the benchmark's ``Size``
by GPT-NeoX's recipe (``_training_peer``), and the peer takes its turns in this process; not in fp16, for which its Trainer wants an
accelerator. A step is forward, backward, norms, clipping and update, without building batches. A ratio is the median over rounds of
the ratio of a round's medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks._training_peer import Size, contestant_step
from stabilitylab.errors import InputError

HERE = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("_build_worker.py")
Turn = Callable[[int], list[float]]


def sized_words(size: Size) -> list[str]:
    """Flags of ``glm train`` for GPT-NeoX's recipe at a size."""
    flags = {
        "model.layers": size.layers,
        "model.hidden": size.hidden,
        "model.heads": max(1, size.hidden // 64),
        "model.vocabulary": size.vocabulary,
        "model.length": size.length,
        "model.norm": "pre",
        "model.init": "gpt2",
        "model.attention.softmax": "fused",
        "model.feed-forward.kind": "gelu",
        "objective.kind": "causal",
        "batch.rows": size.rows,
    }
    switches = ("--model.parallel-block", "--model.embedding.no-tied")
    return [
        "glm-tiny",
        *(word for flag, value in flags.items() for word in (f"--{flag}", str(value))),
        *switches,
    ]


class Build:
    """A build's process.

    Args:
        tree: of the build.
        words: of ``glm train``.
        data: folder made by ``glm shards``.
        native: whether it may use the processor's units for half formats.

    Raises:
        InputError: the build does not start there.
    """

    def __init__(self, tree: Path, words: Sequence[str], *, data: Path, native: bool) -> None:
        self.tree = tree
        environment = {**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(data), str(int(native)), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.parameters = int(self._answer()["parameters"])
        self.loss = float("nan")

    def turn(self, steps: int) -> list[float]:
        """Processor seconds of this many steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        said = self._answer()
        self.loss = float(said["loss"])
        return [float(one) for one in said["seconds"]]

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise InputError(f"the build in {self.tree} ended: see its message above")
        found: dict[str, Any] = json.loads(line)
        return found


def measure_builds(
    *,
    words: Sequence[str] | None,
    size: Size,
    precision: str,
    former: Path | None,
    data: Path,
    rounds: int,
    steps: int,
    native: bool,
    against: Sequence[str] = (),
) -> dict[str, Any]:
    """Milliseconds of a step by contestant, and the others' over this build's.

    Args:
        words: preset and flags; None: ``size`` by GPT-NeoX's recipe, and the peer as well.
        size, precision: of the models.
        former: tree of another build; None: this build's own step without ``against``.
        data: folder made by ``glm shards``.
        rounds, steps: turns of each, and steps in a turn.
        native: whether builds may use half units.
        against: more flags of this build alone, to measure a lever's cost.
    """
    common = [*(sized_words(size) if words is None else words), "--precision", precision]
    builds = {
        "other" if former is None else "former": Build(former or HERE, common, data=data, native=native)
    }
    builds["now"] = Build(HERE, [*common, *against], data=data, native=native)
    turns: dict[str, Turn] = {name: build.turn for name, build in builds.items()}
    if words is None and not against and precision != "fp16":
        _, step = contestant_step("gpt-neox", size, precision, data, compiled=False, recompute=False)
        numbers = iter(range(10**9))

        def peer(count: int) -> list[float]:
            seconds = []
            for _ in range(count):
                began = time.process_time()
                step(next(numbers))
                seconds.append(time.process_time() - began)
            return seconds

        turns["gpt-neox"] = peer
    medians: dict[str, list[float]] = {name: [] for name in turns}
    try:
        for number in range(-1, rounds):
            for name, turn in turns.items():
                seconds = turn(steps if number >= 0 else 2)  # the first ones allocate
                if number >= 0:
                    medians[name].append(statistics.median(seconds))
    finally:
        for build in builds.values():
            build.end()
    tokens = size.rows * size.length
    return {
        "ms": {name: 1e3 * statistics.median(one) for name, one in medians.items()},
        "rounds": medians,
        "parameters": {name: build.parameters for name, build in builds.items()},
        "tokens": tokens,
        "loss": {name: build.loss for name, build in builds.items()},
        "over_now": {
            name: statistics.median(a / b for a, b in zip(one, medians["now"], strict=True))
            for name, one in medians.items()
            if name != "now"
        },
    }

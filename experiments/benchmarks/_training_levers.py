"""The cost of levers: a step with each, and one without, in turn in one process, by processor time.

A step is forward, backward, norms, clipping and update, without building batches. A lever's cost is the median over rounds of its
step's time over that of the plain step of the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm.commands.train import parse_command, with_vocabulary
from glm.data.loader import Loader
from glm.data.shards import open_data
from glm.errors import InputError
from glm.train.engine import LocalEngine

PLAIN = "plain"
LEVERS: Mapping[str, str] = {
    "rms": "--model.norm-kind rms",
    "gate-head": "--model.attention.gate head",
    "gate-element": "--model.attention.gate element",
    "qk-clip": "--model.attention.qk-clip 100",
    "muon": "--optimizer.kind muon",
    **{name: f"--emulate.recipe {name}" for name in ("fp8", "fp8-blocks", "mxfp8", "mxfp4", "nvfp4")},
}


def measure_levers(words: Sequence[str], chosen: Sequence[str], *, data: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step by lever, and over the plain one's.

    Args:
        words: preset and flags of ``glm train``.
        chosen: names in ``LEVERS``; empty: all.
        data: folder made by ``glm shards``.
        rounds: timed steps of each.

    Raises:
        InputError: there is no such lever, or it does not go with the model.
    """
    if unknown := sorted(set(chosen) - set(LEVERS)):
        raise InputError(f"there is no lever {unknown[0]!r} here: choose of {', '.join(LEVERS)}")
    opened = open_data(data)
    engines: dict[str, LocalEngine] = {}
    for name in (PLAIN, *(chosen or LEVERS)):
        flags = [*words, *LEVERS.get(name, "").split()]
        config = with_vocabulary(
            parse_command([*flags, "--data", str(data), "--out", "unused"]).config, opened
        )
        engines[name] = LocalEngine(config)
    loader = Loader(opened, config.objective, config.sampling, length=config.model.length, seed=config.seed)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(-1, rounds):
        batch = loader.batch(number + 1, config.batch.rows)
        for name, engine in engines.items():
            began = time.process_time()
            engine.forward_backward(batch, number + 1)
            engine.gradients()
            engine.update(1e-3, clip=config.optimizer.clip)
            if number >= 0:  # the first one allocates
                seconds[name].append(time.process_time() - began)
    return {
        "ms": {name: 1e3 * statistics.median(one) for name, one in seconds.items()},
        "over_plain": {
            name: statistics.median(a / b for a, b in zip(one, seconds[PLAIN], strict=True))
            for name, one in seconds.items()
        },
        "rounds": seconds,
        "tokens": config.batch.rows * config.model.length,
    }

"""Makes one build's training steps on request; run it by its path, with ``PYTHONPATH`` at the build's tree (``_training_builds``).

    python _build_worker.py DATA NATIVE WORDS...        WORDS: of ``glm train``, a preset first

A line of input is a number of steps; the answer is a line of JSON with the processor seconds of each, and the last loss. The worker
builds batches before. NATIVE 0: as if this processor had no units for half formats. It uses only what both builds have, under each
build's own name.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

BATCHES = 4


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    try:
        from glm.commands import train as command
    except ImportError:  # where it was before
        from glm.train import commands as command  # type: ignore[attr-defined,no-redef]
    from glm.data.loader import Loader
    from glm.data.shards import open_data
    from glm.train.engine import LocalEngine

    data, native, *words = arguments
    if native == "0":
        for name in ("glm.precision.half_units", "glm.precision.matmul"):  # now, and before
            with contextlib.suppress(ImportError):
                importlib.import_module(name).NATIVE_DTYPES = frozenset()  # type: ignore[attr-defined]
    opened = open_data(Path(data))
    parsed = command.parse_command([*words, "--data", data, "--out", "unused"])
    config = command.with_vocabulary(parsed.config, opened)
    loader = Loader(opened, config.objective, config.sampling, length=config.model.length, seed=config.seed)
    batches: list[Any] = [loader.batch(number, config.batch.rows) for number in range(BATCHES)]
    engine = LocalEngine(config)
    number = 0
    answer({"parameters": sum(one.numel() for one in engine.model.parameters())})
    for line in sys.stdin:
        seconds: list[float] = []
        loss = float("nan")
        for _ in range(int(line)):
            began = time.process_time()
            loss = engine.forward_backward(batches[number % BATCHES], number)
            engine.gradients()
            engine.update(config.schedule.peak, clip=config.optimizer.clip)
            seconds.append(time.process_time() - began)
            number += 1
        answer({"seconds": seconds, "loss": loss})


def answer(said: dict[str, Any]) -> None:
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

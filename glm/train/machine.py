"""What a run's bits depend on beside state, data and code: the number of threads, the version of torch, the processor.

A sum that several threads share is added in another order than one thread's, and other versions and processors have other
kernels. Each moves losses by rounding; where training is unstable, that is soon more. So ``run-start`` records them, forks take
the run's number of threads, and what cannot be taken is named where a control departs.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from stabilitylab.runs import Run

_WORDS = {"threads": "{} threads", "torch": "torch {}", "machine": "a processor of kind {}"}


def machine() -> dict[str, Any]:
    """As ``run-start`` records it."""
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def machine_of(run: Run) -> dict[str, Any]:
    """As the run recorded it when it was last started; without what it did not record."""
    for event in reversed(run.events):
        if event.kind == "run-start":
            return {name: event.data[name] for name in machine() if name in event.data}
    return {}


def threads_of(run: Run) -> int | None:
    """The run's number of threads; None: it recorded none."""
    threads = machine_of(run).get("threads")
    return threads if isinstance(threads, int) and threads > 0 else None


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute with so many threads; None: as many as there are."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def otherwise(run: Run, mine: Mapping[str, Any] | None = None) -> str:
    """What a fork has otherwise than the run, in words, "" where nothing is.

    Args:
        mine: the fork's machine; None: this process'.
    """
    theirs, mine = machine_of(run), machine() if mine is None else mine
    said = []
    for name, words in _WORDS.items():
        if name not in theirs and name in mine and name == "threads":
            said.append(f"{words.format(mine[name])}, the run an unrecorded number")
        elif name in theirs and name in mine and theirs[name] != mine[name]:
            said.append(f"{words.format(mine[name])}, the run {theirs[name]}")
    return "; ".join(said)

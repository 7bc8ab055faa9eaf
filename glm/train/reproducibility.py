"""Beside state, data and code a run's bits depend on the device, the number of threads, the version of torch, and the processor.

Several threads add a sum in another order than one thread, and other versions and processors have other kernels. Each moves losses
by rounding; where training is unstable, that soon grows. Another device has other dropout masks too. So ``run-start`` records them,
forks take the run's device and number of threads, and where a control departs the command names the other differences.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from glm.device import chosen_device
from stabilitylab.runs import Run

_WORDS = {
    "device": "the device {}",
    "threads": "{} threads",
    "torch": "torch {}",
    "machine": "a processor of kind {}",
}


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine as ``run-start`` records it.

    Args:
        device: the training device.
    """
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": _name(torch.device(device)),
    }


def _name(device: torch.device) -> str:
    """``cpu``, or an accelerator's kind and model: kernels differ from one to the next."""
    if device.type != "cuda":
        return device.type
    return f"{device.type} ({torch.cuda.get_device_name(device)})"


def machine_of(run: Run) -> dict[str, Any]:
    """The machine as the run recorded it at its last start; without what it did not record."""
    for event in reversed(run.events):
        if event.kind == "run-start":
            return {name: event.data[name] for name in machine() if name in event.data}
    return {}


def device_of(run: Run, asked: str | None = None) -> torch.device:
    """Where forks of a run compute: as asked; else on the kind of device that trained the run, or the CPU where that is missing
    here.

    Raises:
        InputError: this machine cannot use the device asked for.
    """
    recorded = machine_of(run).get("device")
    if asked is not None or not isinstance(recorded, str):  # older runs took the device that there was
        return chosen_device(asked)
    kind = recorded.partition(" ")[0]
    return chosen_device(None if kind == "cuda" else "cpu")


def threads_of(run: Run) -> int | None:
    """The run's number of threads; None: not recorded."""
    threads = machine_of(run).get("threads")
    return threads if isinstance(threads, int) and threads > 0 else None


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute with this many threads; None: leave torch's number."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def otherwise(run: Run, mine: Mapping[str, Any] | None = None) -> str:
    """How a fork's machine differs from the run's, in words; "" where it does not.

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

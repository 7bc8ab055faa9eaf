"""Whether the monitor copes with every optimizer of a package: it must change no weight, lose nothing and raise no false alarm.

    python -m experiments.benchmarks optimizer_sweep torch.optim pytorch_optimizer bitsandbytes.optim torchao.optim ...

For each class derived from ``torch.optim.Optimizer`` that a module of these names offers, the sweep trains a small regression twice
from the same weights, once under a ``Monitor`` whose probes may not fail (``STABILITYLAB_STRICT``), and prints one line:

    same        all weights are those of the twin that nobody watched, bit for bit
    updates     measured steps with a statistic of the first matrix's update, of those there were
    rms_t       whether Adam's second moment was found and compared with the gradient
    alarms      events of other kinds than the detector's own, which judge the loss

An optimizer is made from a rate and all parameters, or else from the matrices alone, or from two groups that ``use_muon`` tells
apart. One that cannot be made so, or whose step fails without a monitor, is named with its reason. The exit code is 1 if any other
has not passed.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from stabilitylab import Monitor
from stabilitylab.errors import InputError
from stabilitylab.sinks.in_memory import MemorySink
from stabilitylab.spikes import KINDS

STEPS, RATE, INPUTS = 24, 1e-3, 96
FIRST = "0.weight"
Make = Callable[[nn.Module], torch.optim.Optimizer]


def main(names: Sequence[str]) -> int:
    """Sweep the modules of these names."""
    if not names or set(names) & {"-h", "--help"}:
        print(__doc__)
        return 0 if names else 2
    modules = {name: _module(name) for name in names}
    torch.set_num_threads(1)
    logging.getLogger("stabilitylab").setLevel(logging.ERROR)
    os.environ["STABILITYLAB_STRICT"] = "1"
    faults = tried = 0
    for name, module in modules.items():
        for kind in optimizers_of(module):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                line, passed = trial(partial(made, kind))
            tried += passed is not None
            faults += passed is False
            print(f"{name}.{kind.__name__}: {line}", flush=True)
    print(f"{tried} optimizers tried, {faults} with a fault")
    return 1 if faults else 0


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{name} cannot be imported ({error}): install its package, or leave it out"
        ) from None


def optimizers_of(module: ModuleType) -> Iterator[Any]:
    """The classes of optimizers that a module offers, each once."""
    seen = {torch.optim.Optimizer}
    for name in dir(module):
        kind = getattr(module, name)
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind not in seen:
            seen.add(kind)
            yield kind


def made(kind: Any, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the model, in the first form that the class takes; raises what it raised of the first."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    both = [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]
    errors: list[Exception] = []
    for parameters in (list(model.parameters()), matrices, both):
        try:
            optimizer: torch.optim.Optimizer = kind(parameters, lr=RATE)
        except Exception as error:  # of any package
            errors.append(error)
        else:
            getattr(optimizer, "train", bool)()  # schedule-free ones have modes
            return optimizer
    raise errors[0]


def trial(make: Make) -> tuple[str, bool | None]:
    """What became of one optimizer, and whether it passed; None where it cannot be tried."""
    try:
        expected = trained(make, None)
    except Exception as error:  # of any package
        return f"not tried, {type(error).__name__}: {' '.join(str(error).split())[:100]}", None
    sink = MemorySink()
    try:
        found = trained(make, sink)
    except Exception as error:  # what the sweep looks for
        return f"FAULT, {type(error).__name__}: {' '.join(str(error).split())[:100]}", False
    same = all(torch.equal(a, b) or bool((a != a).any()) for a, b in zip(found, expected, strict=True))
    frame = sink.frame
    of_first = frame[(frame["family"] == "update") & (frame["site"] == FIRST)]
    updates = int((of_first["statistic"] == "rms").sum())
    rms_t = "yes" if (of_first["statistic"] == "rms_t").any() else "no"
    alarms = [event for event in sink.events if event.kind not in KINDS]
    told = ", ".join(f"{event.kind} at {event.step}" for event in alarms[:3]) or "none"
    passed = same and updates == STEPS // 2 and not alarms
    said = f"same {'yes' if same else 'NO'}, updates {updates}/{STEPS // 2}, rms_t {rms_t}, alarms {told}"
    return said if passed else f"FAULT, {said}", passed


def trained(make: Make, sink: MemorySink | None) -> list[torch.Tensor]:
    """The weights after some steps, watched if there is a sink."""
    random.seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(INPUTS, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 8)
    )
    optimizer = make(model)
    monitor = None if sink is None else Monitor(model, optimizer, every=2, sinks=[sink])
    try:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = (model(torch.randn(16, INPUTS)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            if monitor is not None:
                monitor.step(step, loss=loss)
    finally:
        if monitor is not None:
            monitor.close()
    return [parameter.detach() for parameter in model.parameters()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""stabilitylab: watch every layer of any model while it trains, know when and why it breaks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stabilitylab.errors import InputError as InputError
    from stabilitylab.monitoring.monitor import Monitor as Monitor
    from stabilitylab.monitoring.schedule import Schedule as Schedule
    from stabilitylab.outliers.criteria import Criterion as Criterion
    from stabilitylab.probes.base import Probe as Probe
    from stabilitylab.quantization.scheme import Scheme as Scheme
    from stabilitylab.runs.run import Run as Run
    from stabilitylab.runs.run import load_run as load_run
    from stabilitylab.sinks.base import Sink as Sink
    from stabilitylab.spikes.detector import SpikeDetector as SpikeDetector
    from stabilitylab.spikes.offline import find_episodes as find_spikes
    from stabilitylab.spikes.responses import Policy as Policy
    from stabilitylab.telemetry import Event as Event
    from stabilitylab.telemetry import Key as Key

__version__ = "0.2.0"

# name -> module and name in it; imported on first use: reading a run folder must not load torch.
_PUBLIC = {
    "Criterion": ("stabilitylab.outliers.criteria", "Criterion"),
    "Event": ("stabilitylab.telemetry", "Event"),
    "InputError": ("stabilitylab.errors", "InputError"),
    "Key": ("stabilitylab.telemetry", "Key"),
    "Monitor": ("stabilitylab.monitoring.monitor", "Monitor"),
    "Policy": ("stabilitylab.spikes.responses", "Policy"),
    "Probe": ("stabilitylab.probes.base", "Probe"),
    "Run": ("stabilitylab.runs.run", "Run"),
    "Schedule": ("stabilitylab.monitoring.schedule", "Schedule"),
    "Scheme": ("stabilitylab.quantization.scheme", "Scheme"),
    "Sink": ("stabilitylab.sinks.base", "Sink"),
    "SpikeDetector": ("stabilitylab.spikes.detector", "SpikeDetector"),
    "find_spikes": ("stabilitylab.spikes.offline", "find_episodes"),
    "load_run": ("stabilitylab.runs.run", "load_run"),
}

__all__ = [
    "Criterion",
    "Event",
    "InputError",
    "Key",
    "Monitor",
    "Policy",
    "Probe",
    "Run",
    "Schedule",
    "Scheme",
    "Sink",
    "SpikeDetector",
    "__version__",
    "find_spikes",
    "load_run",
]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        module, attribute = _PUBLIC[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""stabilitylab watches every layer of any model while it trains, and tells when and why it breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stabilitylab.lazy_names import lazy_names

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

# Name -> its module (``module:name`` where its name there differs); imported on first use, as reading a run folder must not load
# torch.
_PUBLIC = {
    "Criterion": "stabilitylab.outliers.criteria",
    "Event": "stabilitylab.telemetry",
    "InputError": "stabilitylab.errors",
    "Key": "stabilitylab.telemetry",
    "Monitor": "stabilitylab.monitoring.monitor",
    "Policy": "stabilitylab.spikes.responses",
    "Probe": "stabilitylab.probes.base",
    "Run": "stabilitylab.runs.run",
    "Schedule": "stabilitylab.monitoring.schedule",
    "Scheme": "stabilitylab.quantization.scheme",
    "Sink": "stabilitylab.sinks.base",
    "SpikeDetector": "stabilitylab.spikes.detector",
    "find_spikes": "stabilitylab.spikes.offline:find_episodes",
    "load_run": "stabilitylab.runs.run",
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

__getattr__, __dir__ = lazy_names(__name__, __all__, _PUBLIC)

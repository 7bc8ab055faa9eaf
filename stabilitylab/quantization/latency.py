"""How long a layer takes on this machine, by shape, scheme and number of rows.

Layers of one shape take the same time, so each shape is timed once, on real rows of the first layer of that shape: the number of
outlier channels decides what the mixed scheme does. All schemes run in turn, and the median of several rounds counts. Rows are
repeated where the text gave fewer. How weights were rounded makes no difference to time, so schemes that round for their inputs are
timed as the schemes that they round to (without AWQ's division of the input). Of layers as wide as a vocabulary, 16,384 outputs are
timed, and the time is taken in proportion.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from stabilitylab.models import linear_weight
from stabilitylab.models.freed_memory import give_back_memory
from stabilitylab.models.half_storage import is_held
from stabilitylab.quantization.replacement import quantized
from stabilitylab.quantization.schemes import LinearScheme, nearest

BATCHES = (1, 32, 256)
_OUTPUTS = 1 << 14
KEPT = "16-bit"  # the name for leaving a layer as it is: its weights count two bytes

# (N, K) -> scheme's name or KEPT -> batch -> seconds
Latencies = Mapping[tuple[int, int], Mapping[str, Mapping[int, float]]]


def machine() -> str:
    """The machine that the times are from, in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def measure_latencies(
    module: nn.Module,
    samples: Mapping[tuple[int, int], tuple[str, Tensor]],
    largest: Mapping[str, Tensor],
    schemes: Sequence[LinearScheme],
    *,
    batches: Sequence[int] = BATCHES,
    rounds: int = 5,
) -> dict[tuple[int, int], dict[str, dict[int, float]]]:
    """Seconds of one call in each scheme, and of the layer as it is.

    Args:
        module: the model.
        samples: (N, K) -> path of a layer and rows of its input (``ranges.Inputs.samples``).
        largest: path -> max|x| of each input channel.
        schemes: to time.
        batches: numbers of rows.
        rounds: the median is over this many, after one that warms up.
    """
    found: dict[tuple[int, int], dict[str, dict[int, float]]] = {}
    for shape, (path, rows) in samples.items():
        layer, times = _part(module.get_submodule(path))
        calls: dict[str, nn.Module] = {KEPT: layer}
        calls |= {scheme.name: quantized(path, layer, nearest(scheme), largest[path]) for scheme in schemes}
        found[shape] = {name: {} for name in calls}
        for batch in batches:
            x_MK = rows.repeat(-(-batch // len(rows)), 1)[:batch].contiguous()
            for name, seconds in _medians(calls, x_MK, rounds).items():
                found[shape][name][batch] = times * seconds
        calls.clear()
        give_back_memory()  # twins of this shape
    return found


def _part(layer: nn.Module) -> tuple[nn.Module, float]:
    """A layer of plain floats with at most ``_OUTPUTS`` of its outputs, and how many times as many the layer has."""
    weight = linear_weight(layer)
    narrow = is_held(layer)
    if len(weight) <= _OUTPUTS and not narrow:
        return layer, 1.0
    part = weight.detach()[:_OUTPUTS]
    made = nn.Linear(part.shape[1], part.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(part.float() if narrow else part, requires_grad=False)
    if isinstance(layer.bias, Tensor):
        made.bias = nn.Parameter(layer.bias.detach()[:_OUTPUTS], requires_grad=False)
    return made, len(weight) / len(part)


@torch.inference_mode()
def _medians(calls: Mapping[str, nn.Module], x_MK: Tensor, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call(x_MK)
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}

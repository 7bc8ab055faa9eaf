"""Peak memory of a training step, each measurement in its own process.

The process builds model and optimizer and makes a step, so that every buffer exists; then the kernel forgets its resident peak, and
the process makes a second step. Two batch sizes separate the cost of a token from the rest:

    bytes a token = (peak(2 r rows) - peak(r rows)) / (r T)

malloc returns large blocks, so that the resident set follows the tensors. Linux only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from experiments.benchmarks._training_peer import Contestant, Size, contestant_step
from stabilitylab.errors import InputError

STATUS = Path("/proc/self/status")
FORGET_PEAK = Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """VmHWM (peak) or VmRSS (now) of this process, bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise InputError(f"{STATUS} does not tell {field}: peak memory is measured on Linux only")


def measure_here(wanted: dict[str, object]) -> dict[str, int]:
    """In the child: resident bytes before the model exists, and at the peak of its second step."""
    size = Size(**wanted["size"])  # type: ignore[arg-type]
    contestant: Contestant = wanted["contestant"]  # type: ignore[assignment]
    torch.set_num_threads(1)
    # The peer's imports count as little as ours.
    tiny = dataclasses.replace(size, layers=1, hidden=64, length=32, rows=1)
    data = Path(str(wanted["data"])) if wanted["data"] else None
    contestant_step(contestant, tiny, "fp32", data)[1](0)
    before = resident("VmRSS")
    _, step = contestant_step(
        contestant, size, str(wanted["precision"]), data, recompute=bool(wanted["recompute"])
    )
    step(0)
    FORGET_PEAK.write_text("5")
    step(1)
    return {"before": before, "peak": resident("VmHWM")}


def peak(contestant: Contestant, size: Size, precision: str, data: Path | None, *, recompute: bool) -> int:
    """Bytes that training adds to a process, at the peak of a step."""
    wanted = {
        "contestant": contestant,
        "size": dataclasses.asdict(size),
        "precision": precision,
        "data": str(data) if data else None,
        "recompute": recompute,
    }
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks._training_memory", json.dumps(wanted)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return int(found["peak"] - found["before"])


def memory(
    contestant: Contestant, size: Size, precision: str, data: Path | None, *, recompute: bool = False
) -> dict[str, float]:
    """Peak at ``size``, and the cost of a token."""
    half = dataclasses.replace(size, rows=max(1, size.rows // 2))
    full = dataclasses.replace(size, rows=2 * half.rows)
    small, large = (peak(contestant, s, precision, data, recompute=recompute) for s in (half, full))
    return {"peak": float(large), "bytes_per_token": (large - small) / (half.rows * half.length)}


if __name__ == "__main__":
    print(json.dumps(measure_here(json.loads(sys.argv[1]))))

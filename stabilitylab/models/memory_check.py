"""Whether a model's weights fit into memory, checked before they are read: later the system ends the process without a word.

needed     numbers x bytes of the format they are opened in
there is   the least of the machine's available memory and what the control group has left
"""

from __future__ import annotations

from pathlib import Path

import torch

from stabilitylab.errors import InputError

_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
# A number takes at least this many bits in any file, so that small files need no counting of their numbers.
_LEAST_BITS = 1.5


def available_memory() -> int | None:
    """Bytes that a process can still take; None where the system does not say."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    except (OSError, ValueError, IndexError):
        pass
    for limit, used in _GROUPS:
        try:
            found.append(int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # "max": no limit
            continue
    return min(found, default=None)


def surely_fits(size: int, dtype: torch.dtype) -> bool:
    """Whether a weights file of this many bytes fits, however few bits its numbers have."""
    there = available_memory()
    return there is None or size * 8 / _LEAST_BITS * dtype.itemsize <= there


def require_room(path: Path, numbers: int, dtype: torch.dtype) -> None:
    """Refuse a model that does not fit.

    Raises:
        InputError: its weights take more than there is.
    """
    there, needed = available_memory(), numbers * dtype.itemsize
    if there is not None and needed > there:
        raise InputError(
            f"{path} has {numbers / 1e9:.1f} G weights, {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and "
            f"{there / 1e9:.1f} GB of memory are free: take a machine with more, or a smaller model of the family"
        )

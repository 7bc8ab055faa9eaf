"""Whether this processor has units for products of half numbers: from its list of instructions and never from timing, so that the
same machine always takes the same path, and a run repeats bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)

# /proc/cpuinfo's names of the instructions that multiply the format natively.
NATIVE_FLAGS = {
    torch.bfloat16: frozenset({"avx512_bf16", "amx_bf16"}),
    torch.float16: frozenset({"avx512_fp16", "amx_fp16"}),
}


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU as Linux lists them; empty where the system has no such list."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


# Read once, at import: inside a compiled model it is a constant.
NATIVE_DTYPES = frozenset(dtype for dtype, names in NATIVE_FLAGS.items() if names & cpu_flags())


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has units for products of ``dtype``. An unknown CPU counts as one without: slower, never wrong."""
    return dtype in NATIVE_DTYPES


def upcasts(x: Tensor) -> bool:
    """Whether we compute products of tensors like ``x`` in fp32 and round them."""
    return x.dtype in HALF_DTYPES and x.device.type == "cpu" and not multiplies_natively(x.dtype)

"""Giving freed memory back, so that loading a model layer by layer peaks at about what the model holds.

glibc keeps what is freed for the next request, and small tensors that stay between large ones that went leave holes: a model of
100M parameters quantized to int8 took three times its size. Asked to, it returns the pages inside such holes as well.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back_memory() -> None:
    """Return freed pages to the system; with other C libraries than glibc nothing happens."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None

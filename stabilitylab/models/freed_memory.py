"""Gives memory back: what was freed, and the pages of a mapped file that were read.

glibc keeps freed memory for the next request, and small tensors that stay between large ones that went leave holes: a model of 100M
parameters quantized to int8 took three times its size. Asked to, glibc returns the pages inside such holes as well.

Pages of a mapped file count as the process's own from the first reading on, so a model that is read layer by layer grows to the
size of its file. The process can let the file's pages go (``MADV_DONTNEED``): the next reading gets the same numbers, from the
system's cache as long as there is room. A page that was written to exists nowhere else and would be lost, so we first ask the
system which pages still are the file's (``/proc/self/pagemap``: Linux' documentation, admin-guide/mm/pagemap).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

_LEAST = 1 << 18  # bytes: smaller tensors are not worth a call
_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)
_PRESENT, _SWAPPED, _OF_A_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def give_back_memory() -> None:
    """Return freed pages to the system; does nothing with other C libraries than glibc."""
    trim = _trim()
    if trim is not None:
        trim(0)


def let_go_of_pages(tensors: Iterable[Tensor]) -> None:
    """Let go of the pages of tensors that lie unchanged in mapped files; does nothing for others, and elsewhere than on Linux.

    Args:
        tensors: their numbers stay what they are.
    """
    advise, pages = _advise(), _pagemap()
    if advise is None or pages is None:
        return
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if size < _LEAST or tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        first = tensor.data_ptr() // mmap.PAGESIZE
        count = -(-(tensor.data_ptr() + size) // mmap.PAGESIZE) - first
        try:
            entries = np.frombuffer(os.pread(pages, 8 * count, 8 * first), dtype=np.uint64)
        except OSError:
            continue
        present = (entries & _PRESENT) != 0
        own = (present & ((entries & _OF_A_FILE) == 0)) | ((entries & _SWAPPED) != 0)
        if len(entries) == count and present.any() and not own.any():
            advise(ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE), _DONTNEED)


@cache
def _trim() -> Any:
    return _of_libc("malloc_trim")


@cache
def _advise() -> Any:
    return None if _DONTNEED is None else _of_libc("madvise")


@cache
def _pagemap_of(_process: int) -> int | None:
    try:
        return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return None


def _pagemap() -> int | None:
    # A forked process has pages of its own.
    return _pagemap_of(os.getpid())


def _of_libc(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None

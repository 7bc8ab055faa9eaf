"""A worker: a process that trains one run of a suite after another, so that start-up is paid once and not a run.

A run in it is ``glm train`` with the same words, in the same interpreter, with one thread: the same bits as the command alone (a
test says so). Runs share nothing: weights, batches and masks are functions of the seed, and what a run writes is its folder.

Memory that a step frees is kept for the next one (glibc's ``mallopt``): given back and taken again, pages are cleared by the kernel
at every tensor, an eighth of the time of a small model. A worker whose parent is gone ends, so that nobody is left behind.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import io
import multiprocessing
import os
import threading
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import wait
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# glibc's numbers of the two settings, and what means "never" for both.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _NEVER = -1, -3, (1 << 31) - 1


def prepare() -> None:
    """What a worker does before its first run."""
    # One thread a run: two small runs side by side use two cores better than one run with two threads.
    os.environ.update(dict.fromkeys(THREADS, "1"))
    keep_freed_memory()
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def train(words: Sequence[str], log: Path) -> int:
    """One run: ``glm`` with these words; what it says is added to ``log``. Returns its exit code."""
    import torch

    from glm.cli import main

    torch.set_num_threads(1)
    with (
        log.open("a", encoding="utf-8", buffering=1) as file,
        redirect_stdout(file),
        redirect_stderr(file),
    ):
        try:
            return main(list(words))
        except SystemExit as end:  # what the parser says of words that it does not know
            return end.code if isinstance(end.code, int) else 2
        finally:
            _set_imports_aside()


@functools.cache
def _set_imports_aside() -> None:
    """After the first run: libraries live as long as the process, and need not be searched for garbage again and again."""
    gc.collect()
    gc.freeze()


def last_line(log: Path) -> str:
    """The last line of a log that grows; "" before there is one."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - 4096))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def keep_freed_memory() -> bool:
    """Have the allocator keep what is freed. False where this is not glibc's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all(mallopt(number, _NEVER) for number in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)

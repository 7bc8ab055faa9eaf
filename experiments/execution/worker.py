"""A worker process trains one run of a suite after another, and so pays for start-up once and not per run.

A run in it is ``glm train`` with the same words, in the same interpreter, with one thread: the same bits as the command alone (a
test says so). Runs share nothing: weights, batches and masks are functions of the seed, and a run writes only into its folder.

The allocator keeps memory that a step frees for the next one (glibc's ``mallopt``): otherwise the kernel clears returned pages at
every tensor, an eighth of the time of a small model. A worker ends when its parent is gone, so that none stays behind.
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
# glibc's numbers of the two settings, and the value for "never".
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _NEVER = -1, -3, (1 << 31) - 1


def prepare() -> None:
    """Prepare a worker before its first run."""
    # One thread per run: two small runs side by side use two cores better than one run with two threads.
    os.environ.update(dict.fromkeys(THREADS, "1"))
    keep_freed_memory()
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def train(words: Sequence[str], log: Path) -> int:
    """One run: ``glm`` with these words; appends its output to ``log``. Returns its exit code."""
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
        except SystemExit as end:  # the parser's exit at unknown words
            return end.code if isinstance(end.code, int) else 2
        finally:
            _set_imports_aside()


@functools.cache
def _set_imports_aside() -> None:
    """After the first run: libraries live as long as the process, so the collector need not search them again and again."""
    gc.collect()
    gc.freeze()


def last_line(log: Path) -> str:
    """The last line of a growing log; "" before there is one."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - 4096))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def keep_freed_memory() -> bool:
    """Have the allocator keep freed memory. False where it is not glibc's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all(mallopt(number, _NEVER) for number in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)

"""Where a suite's runs are computed: anything that is a ``concurrent.futures.Executor``.

    local           long-lived processes on this machine
    dask:ADDRESS    the workers of a Dask cluster, which must see the same files and have this project installed

An executor is opened anew where its processes died; the runs that were in them are resumed from their checkpoints.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

from experiments import worker
from stabilitylab.errors import InputError

T = TypeVar("T")


def local(parallel: int) -> Executor:
    """``parallel`` processes of this machine."""
    # Spawned, not forked: a fork of a process with threads, which torch has, may hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(parallel, mp_context=context, initializer=worker.prepare)


class Dask(Executor):
    """All workers of a Dask cluster, which have one thread each.

    Raises:
        InputError: Dask is not installed, or nobody answers at the address.
    """

    def __init__(self, address: str) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise InputError("--executor dask:... needs Dask: pip install 'stabilitylab[dask]'") from None
        try:
            self._client = Client(address, timeout="10s", set_as_default=False)
        except (OSError, ValueError) as error:
            raise InputError(
                f"no Dask scheduler answers at {address} ({error}): start one, or give its address"
            ) from None
        self._inner: Executor = self._client.get_executor(pure=False, retries=0)

    def submit(self, call: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return self._inner.submit(call, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._inner.shutdown(wait=wait)
        self._client.close()


def chosen(name: str, parallel: int | None) -> tuple[Callable[[], Executor], int]:
    """What opens the executor of that name, and how many runs to hand it at a time.

    Raises:
        InputError: there is none of that name.
    """
    kind, _, address = name.partition(":")
    if kind == "local" and not address:
        processes = parallel or available_cores()
        return lambda: local(processes), processes
    if kind == "dask" and address:
        return lambda: Dask(address), parallel or 1_000_000
    raise InputError(f"there is no executor {name!r}: choose local, or dask:ADDRESS")


def available_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # neither macOS nor Windows knows it
        return os.cpu_count() or 1

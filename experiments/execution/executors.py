"""Where runs compute: on any ``concurrent.futures.Executor``.

    local               long-lived processes on this machine
    dask:ADDRESS        the workers of a Dask cluster
    ray, ray:ADDRESS    those of a Ray cluster; without an address one on this machine's cores
    slurm, slurm:K=V,.. a Slurm job a run, through submitit; K=V are submitit's parameters (timeout_min=60, slurm_partition=cpu)

All but the first need machines that see the same files under the same paths and have this project installed. Where an executor's
processes die, the runner opens a new one and resumes their runs from checkpoints.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from experiments.execution import worker
from stabilitylab.errors import InputError

T = TypeVar("T")

NAMES = "local, dask:ADDRESS, ray, ray:ADDRESS, slurm, or slurm:KEY=VALUE,..."
# The most tasks for a cluster's queue, which decides itself how many run at once.
QUEUE = 1_000_000
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_ANSWER = 10


class Kept:
    """Keeps an executor from one group of runs to the next; drops a broken one and opens another.

    Args:
        opens: makes an executor.
        most: tasks to hand it at a time.
    """

    def __init__(self, opens: Callable[[], Executor], most: int) -> None:
        self._opens, self.most = opens, most
        self._executor: Executor | None = None

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.let_go(wait=kind is None)

    def opened(self) -> Executor:
        """The executor; opens one if there is none."""
        if self._executor is None:
            self._executor = self._opens()
        return self._executor

    def let_go(self, *, wait: bool) -> None:
        """End it, and cancel its tasks that have not begun."""
        if self._executor is not None:
            self._executor.shutdown(wait=wait, cancel_futures=True)
            self._executor = None


def local(parallel: int) -> Executor:
    """``parallel`` processes of this machine."""
    # Spawned, not forked: a fork of a process with threads, such as torch's, may hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(parallel, mp_context=context, initializer=worker.prepare)


class Dask(Executor):
    """All workers of a Dask cluster, with one thread each.

    Raises:
        InputError: Dask is not installed, or nobody answers at the address.
    """

    def __init__(self, address: str) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise InputError("--executor dask:... needs Dask: pip install 'stabilitylab[dask]'") from None
        try:
            self._client = Client(address, timeout=f"{SECONDS_TO_ANSWER}s", set_as_default=False)
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


class Ray(Executor):
    """The workers of a Ray cluster, one core per task; they live from task to task.

    Args:
        address: of the cluster, as ``ray.init`` takes it; "" begins one on this machine, which ends with the executor.

    Raises:
        InputError: Ray is not installed, or nobody answers at the address.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise InputError("--executor ray needs Ray: pip install 'stabilitylab[ray]'") from None
        if address:
            knock(address)
        self._ray = ray
        paths = {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}}
        try:
            ray.init(
                address=address or None,
                runtime_env=paths,
                log_to_driver=False,
                include_dashboard=False if not address else None,
                logging_level="error",
                ignore_reinit_error=False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"no Ray cluster answers at {address or 'this machine'} ({' '.join(str(error).split())[:200]}): "
                "start one with `ray start --head`, or give its address"
            ) from None
        self._call = ray.remote(num_cpus=1, max_retries=0)(_on_worker)
        self._references: list[Any] = []

    def submit(self, call: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        reference = self._call.remote(call, args, kwargs)
        self._references.append(reference)
        inner: Future[T] = reference.future()
        outer: Future[T] = Future()
        outer.set_running_or_notify_cancel()
        inner.add_done_callback(lambda done: self._pass_on(done, outer))
        return outer

    def _pass_on(self, done: Future[T], outer: Future[T]) -> None:
        error = done.exception()
        if error is None:
            outer.set_result(done.result())
            return
        lost = (self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.NodeDiedError)
        cause = getattr(error, "cause", None)
        outer.set_exception(
            BrokenExecutor(" ".join(str(error).split())) if isinstance(error, lost) else cause or error
        )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if wait and self._references and not cancel_futures:
            self._ray.wait(self._references, num_returns=len(self._references))
        self._ray.shutdown()


def knock(address: str) -> None:
    """Raise InputError if nobody listens at ``HOST:PORT`` or ``ray://HOST:PORT``; Ray itself takes minutes to find out."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):  # "auto", or a form that Ray knows
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}): start one with `ray start --head`, or give its address"
        ) from None


def _on_worker(call: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    worker.keep_freed_memory()
    return call(*args, **kwargs)


class Submitit(Executor):
    """One batch job per task, through submitit.

    Args:
        folder: for jobs and their output; all machines must see it.
        parameters: submitit's, by their names.
        cluster: "slurm"; "local" or "debug" to try it without Slurm.

    Raises:
        InputError: submitit is not installed, there is no Slurm here, or it does not know a parameter.
    """

    def __init__(self, folder: Path, parameters: dict[str, str | int], *, cluster: str = "slurm") -> None:
        try:
            import submitit
        except ImportError:
            raise InputError("--executor slurm needs submitit: pip install 'stabilitylab[slurm]'") from None
        self._failed = submitit.core.utils.UncompletedJobError
        try:
            self._inner = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._inner.update_parameters(**{"name": "stabilitylab", "cpus_per_task": 1, **parameters})
        except RuntimeError as error:
            raise InputError(
                f"Slurm is not to be had here ({error}): run this where sbatch is, or use --executor local"
            ) from None
        except (NameError, TypeError, AssertionError) as error:
            raise InputError(
                f"--executor slurm: {' '.join(str(error).split())[:300]}: give submitit's parameters, "
                "for instance slurm:timeout_min=60,slurm_partition=NAME"
            ) from None
        self._jobs: dict[Future[Any], Any] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._looking.start()

    def submit(self, call: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self._jobs[future] = self._inner.submit(_in_job, call, args, kwargs)
        return future

    def _look(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            with self._lock:
                jobs = dict(self._jobs)
            for future, job in jobs.items():
                if job.done():
                    self._take(future, job)
                    with self._lock:
                        del self._jobs[future]

    def _take(self, future: Future[Any], job: Any) -> None:
        try:
            found, error = job.result()
        except self._failed as death:  # killed, out of memory, over its time
            found, error = None, BrokenExecutor(" ".join(str(death).split())[:500])
        if error is None:
            future.set_result(found)
        else:
            future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        while wait and not cancel_futures and self._jobs:
            time.sleep(SECONDS_BETWEEN_LOOKS / 10)
        self._ended.set()
        self._looking.join()
        for job in self._jobs.values():  # nobody waits for them any more
            job.cancel(check=False)


def _in_job(
    call: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[T | None, Exception | None]:
    """Return or raise as the call does: submitit itself would pass on only an error's text."""
    os.environ.update(dict.fromkeys(worker.THREADS, "1"))
    worker.keep_freed_memory()
    try:
        return call(*args, **kwargs), None
    except Exception as error:
        return None, error


def chosen(name: str, parallel: int | None, folder: Path) -> tuple[Callable[[], Executor], int]:
    """The function that opens the executor of that name, and how many tasks to give it at a time.

    Args:
        folder: for an executor's own files.

    Raises:
        InputError: there is none of that name.
    """
    kind, _, rest = name.partition(":")
    if kind == "local" and not rest:
        processes = parallel or available_cores()
        return lambda: local(processes), processes
    if kind == "dask" and rest:
        return lambda: Dask(rest), parallel or QUEUE
    if kind == "ray":
        return lambda: Ray(rest), parallel or QUEUE
    if kind == "slurm":
        parameters = _parameters(rest)
        return lambda: Submitit(folder / "slurm", parameters), parallel or QUEUE
    raise InputError(f"there is no executor {name!r}: choose {NAMES}")


def _parameters(text: str) -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise InputError(f"--executor slurm: {part!r} is not KEY=VALUE, such as timeout_min=60")
        found[key] = int(value) if value.isdigit() else value
    return found


def available_cores() -> int:
    """Number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # neither macOS nor Windows has it
        return os.cpu_count() or 1

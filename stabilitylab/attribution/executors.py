"""Train forks in this process, or side by side in several that each open the loop for themselves."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, Protocol

import torch

from stabilitylab.attribution.ablation import Without
from stabilitylab.attribution.fork_verdicts import Yardstick
from stabilitylab.attribution.forks import Fork, Forks, Usual
from stabilitylab.attribution.loop import Loop, LoopState


class Trains(Protocol):
    """Trains forks, in any order; asks ``go_on`` before it begins each."""

    def train(self, several: Sequence[Without], go_on: Callable[[], bool]) -> Iterator[Fork]:
        """The trained forks."""

    def close(self) -> None:
        """End the processes."""


class InThisProcess:
    """Trains one fork after the other."""

    def __init__(self, forks: Forks) -> None:
        self._forks = forks

    def train(self, several: Sequence[Without], go_on: Callable[[], bool]) -> Iterator[Fork]:
        for without in several:
            if not go_on():
                return
            yield self._forks.train(without)

    def close(self) -> None:
        """Nothing is open."""


class SideBySide:
    """Trains in ``processes`` processes, each with this one's number of threads: another number adds sums in another order.

    Args:
        open_loop: makes the loop in each process; must pickle.
        forks: gives their state, yardstick and usual sizes.
    """

    def __init__(self, open_loop: Callable[[], Loop], forks: Forks, processes: int) -> None:
        # As bytes: torch would pass tensors as shared memory, to which every process could write.
        given = pickle.dumps(
            (torch.get_num_threads(), forks.state, forks.signal, forks.yardstick, forks.usual)
        )
        # Spawned: a fork of a process with threads, such as torch's, may hang.
        context = multiprocessing.get_context("spawn")
        self._most = processes
        self._pool = ProcessPoolExecutor(processes, context, initializer=_open, initargs=(open_loop, given))

    def train(self, several: Sequence[Without], go_on: Callable[[], bool]) -> Iterator[Fork]:
        waiting, running = list(several), set[Future[Fork]]()
        while waiting or running:
            while waiting and len(running) < self._most:
                if not go_on():
                    waiting.clear()
                    break
                running.add(self._pool.submit(_train, waiting.pop(0)))
            if running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


_own: list[Forks] = []


def _open(open_loop: Callable[[], Loop], given: bytes) -> None:
    unpickled: tuple[int, LoopState, str, Yardstick, Usual] = pickle.loads(given)
    threads, state, signal, yardstick, usual = unpickled
    torch.set_num_threads(threads)
    forks = Forks(open_loop(), state, signal=signal)
    forks.yardstick, forks.usual = yardstick, usual
    _own[:] = [forks]


def _train(without: Without) -> Any:
    return _own[0].train(without)

"""Where forks are trained: in this process, or side by side in several that each open the loop for themselves."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, Protocol

import torch

from stabilitylab.attribution.fork_verdicts import Yardstick
from stabilitylab.attribution.forks import Fork, Forks, Usual
from stabilitylab.attribution.loop import Loop, LoopState
from stabilitylab.attribution.without import Without


class Trains(Protocol):
    """Trains forks, in any order; ``go_on`` is asked before each is begun."""

    def train(self, several: Sequence[Without], go_on: Callable[[], bool]) -> Iterator[Fork]:
        """Those that were trained."""

    def close(self) -> None:
        """No more."""


class InThisProcess:
    """One after the other."""

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
    """``processes`` of them, each with this one's number of threads: with another, sums are added in another order.

    Args:
        open_loop: makes the loop in each process; it is pickled.
        forks: whose state, yardstick and usual sizes they take.
    """

    def __init__(self, open_loop: Callable[[], Loop], forks: Forks, processes: int) -> None:
        # As bytes: torch would hand tensors over as shared memory, which every process could write to.
        given = pickle.dumps(
            (torch.get_num_threads(), forks.state, forks.signal, forks.yardstick, forks.usual)
        )
        # Spawned: a fork of a process that has threads, as torch's has, may hang.
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

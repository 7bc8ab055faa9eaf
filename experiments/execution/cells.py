"""Measures a study's cells through an executor: as many at once as it takes, with results in the order of the cells.

A cell goes to a worker by the study's name and not as an object, since a study holds functions: the worker opens the same file.
When an executor dies, another one gets its cells; after three deaths under one cell the study ends, and keeps what it measured.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from functools import cache
from itertools import chain
from pathlib import Path

import torch

from experiments.lookup import load
from experiments.study import Measured, Study
from stabilitylab.errors import InputError

DEATHS = 3
ArmSeeds = Sequence[tuple[str, int]]


def through(
    opened: Callable[[], Executor], most: int, *, asked: str, data: Path
) -> Callable[[ArmSeeds], Iterator[Measured]]:
    """The function by which ``run_study`` measures cells, from the arm and seed of each.

    Args:
        opened: opens an executor.
        most: cells at a time.
        asked: name or file of the study.
        data: folder made by ``glm shards``.
    """
    path = Path(asked)
    named = str(path.resolve()) if path.is_file() else asked

    def measured(cells: ArmSeeds) -> Iterator[Measured]:
        waiting, running = deque(cells), deque[tuple[tuple[str, int], Future[Measured]]]()
        deaths: dict[tuple[str, int], int] = {}
        executor = opened()
        try:
            while waiting or running:
                try:
                    while waiting and len(running) < most:
                        future = executor.submit(measured_cell, named, *waiting[0], data.resolve())
                        running.append((waiting.popleft(), future))
                    cell, future = running[0]
                    found = future.result()
                except BrokenExecutor:
                    executor.shutdown(wait=False, cancel_futures=True)
                    for cell, _ in running:
                        deaths[cell] = deaths.get(cell, 0) + 1
                        if deaths[cell] >= DEATHS:
                            raise InputError(
                                f"{cell[0]}, seed {cell[1]}: its process died {DEATHS} times (out of memory?); what was measured "
                                "is kept, and the same command resumes from there"
                            ) from None
                    waiting = deque(chain((cell for cell, _ in running), waiting))
                    running.clear()
                    executor = opened()
                    continue
                running.popleft()
                yield found
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    return measured


def measured_cell(asked: str, arm: str, seed: int, data: Path) -> Measured:
    """In a worker, measure a cell: its values, and their processor seconds."""
    torch.set_num_threads(1)
    study = _study(asked)
    began = time.process_time()
    chosen = next(one for one in study.arms if one.name == arm)
    values: Mapping[str, float] = dict(study.measure(study.cell(chosen, seed, data)))
    return values, time.process_time() - began


@cache
def _study(asked: str) -> Study:
    found = load(asked)
    assert isinstance(found, Study)
    return found

"""LaunchedProcesses meet in a store that holds what dead ones left."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from glm.distributed.rendezvous import meet
from tests.patience import PATIENCE


def attempt(store, world: int, late: int | None = None) -> list[str]:
    """What each rank of an attempt agrees on."""
    agreed = [""] * world

    def rank(number: int) -> None:
        if number == late:
            time.sleep(0.2)
        agreed[number] = meet(store, number, world, timeout=PATIENCE)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return agreed


@pytest.mark.parametrize("late", [None, 0, 1, 3])
def test_each_attempt_agrees_on_a_name_of_its_own(late):
    store = dist.HashStore()
    names = [attempt(store, 4, late) for _ in range(3)]
    assert all(len(set(one)) == 1 and one[0] for one in names)
    assert len({one[0] for one in names}) == 3


def test_dead_ranks_of_an_attempt_that_never_met_are_not_met():
    """Two of four ranks signed in and died, one of them the first to do so; one confirmed what the first wrote."""
    store = dist.HashStore()
    for number in (0, 2):
        with pytest.raises(RuntimeError, match="not all 4 came within 0 s"):
            meet(store, number, 4, timeout=0.1)
    assert len(set(attempt(store, 4, 2))) == 1


def test_one_process_meets_itself():
    assert meet(dist.HashStore(), 0, 1, timeout=1)

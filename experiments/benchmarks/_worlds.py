"""Does the same work in every process of a small world, forked from this one so that nothing is imported twice."""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from glm.data.batch import Batch
from glm.distributed.config import ParallelConfig
from glm.distributed.launch import joined
from glm.model.config import ModelConfig

T = TypeVar("T")


def import_all() -> None:
    """Import what every rank would import for itself: DeepSpeed, and what torch's optimizers load when the first is made."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    importlib.import_module("glm.parallel.engine")
    torch.optim.SGD([torch.zeros(1)], 0.1)


def in_world(parallel: ParallelConfig, work: Callable[[], T]) -> list[T]:
    """The results of ``work`` by rank. Raises RuntimeError if it fails on any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(parallel.ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": parallel.ranks, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
            child = os.fork()
            if child == 0:
                _rank(parallel, work, Path(folder) / str(rank))
            children.append(child)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
            os.environ.pop(name)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(parallel.ranks)]


def _rank(parallel: ParallelConfig, work: Callable[[], T], out: Path) -> None:
    try:
        with joined(parallel, torch.device("cpu"), str(parallel)):
            out.write_bytes(pickle.dumps(work()))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def batch(model: ModelConfig, rows: int, step: int) -> Batch:
    """Random rows: every token one segment, a context first, targets on 60 % of tokens."""
    assert model.vocabulary is not None
    g = torch.Generator().manual_seed(step)
    targets_BT = torch.randint(0, model.vocabulary, (rows, model.length), generator=g)
    targets_BT[torch.rand(rows, model.length, generator=g) < 0.4] = -100
    positions_BT = torch.arange(model.length).expand(rows, -1).contiguous()
    return Batch(
        tokens_BT=torch.randint(0, model.vocabulary, (rows, model.length), generator=g),
        targets_BT=targets_BT,
        positions=positions_BT,
        segments_BT=torch.zeros(rows, model.length, dtype=torch.int32),
        context_BT=positions_BT < model.length // 4,
        provenance=((),) * rows,
    )

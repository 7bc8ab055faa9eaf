"""Joins the processes that a launcher started.

torchrun and DeepSpeed's launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Slurm's srun sets SLURM_PROCID,
SLURM_NTASKS, SLURM_LOCALID and the list of nodes, whose first one is the master; MASTER_PORT is then 29500 unless it is set.

Each process checks what it can know alone (the number of processes, the topology) before it waits for another. One exchange right
after compares the rest, such as each rank's configuration and version.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from glm.distributed.config import ParallelConfig
from glm.distributed.process_group import EverywhereError, LaunchedProcesses, ProcessGroup, SingleProcess
from glm.distributed.rendezvous import meet
from glm.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

PORT = "29500"
# A thread of gloo drops the tensors of a finished collective just after their waiter has gone on, and needs Python's lock for it.
# DeepSpeed's module keeps groups, and with them these threads, until the interpreter ends, where asking for that lock aborts the
# process: a complete run ended with "terminate called without an active exception" (seen once).
SECONDS_TO_LET_GO = 0.05


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process among those that a launcher started."""

    rank: int
    world: int
    local_rank: int
    master: str
    port: str


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Where this process stands; None: no launcher started it."""
    e = environment
    if "RANK" in e and "WORLD_SIZE" in e:
        rank = int(e["RANK"])
        return Place(
            rank=rank,
            world=int(e["WORLD_SIZE"]),
            local_rank=int(e.get("LOCAL_RANK", rank)),
            master=e.get("MASTER_ADDR", "127.0.0.1"),
            port=e.get("MASTER_PORT", PORT),
        )
    # An interactive shell inside an allocation has SLURM_* variables too, but no step.
    if "SLURM_PROCID" in e and "SLURM_STEP_ID" in e and int(e.get("SLURM_NTASKS", "1")) > 1:
        return Place(
            rank=int(e["SLURM_PROCID"]),
            world=int(e["SLURM_NTASKS"]),
            local_rank=int(e.get("SLURM_LOCALID", "0")),
            master=e.get("MASTER_ADDR", first_node(e.get("SLURM_NODELIST", "127.0.0.1"))),
            port=e.get("MASTER_PORT", PORT),
        )
    return None


def first_node(nodes: str) -> str:
    """The first host of Slurm's compressed list: ``gpu[03-07,12],login1`` -> ``gpu03``."""
    found = re.match(r"([^,\[]+)(?:\[([^\],\-]+)[^\]]*\])?([^,]*)", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def speaks() -> bool:
    """Whether this process shows its errors and progress to a person: on rank 0, or without a launcher."""
    here = place()
    return here is None or here.rank == 0


def check_started(config: ParallelConfig) -> None:
    """Compare the axes with the number of processes. Raises InputError, the same on every rank."""
    here = place()
    started = here.world if here is not None else 1
    if started == config.ranks:
        return
    axes = (
        f"parallel.tensor {config.tensor} x parallel.pipeline {config.pipeline} x parallel.data {config.data}"
    )
    if here is None:
        raise EverywhereError(
            f"{axes} needs {config.ranks} processes and this is one: "
            f"start it with torchrun --nproc-per-node {config.ranks} -m glm train ..."
        )
    raise EverywhereError(
        f"{axes} is {config.ranks}, but {started} processes were started: change one of the two"
    )


@contextmanager
def joined(config: ParallelConfig, device: torch.device, run: str) -> Iterator[ProcessGroup]:
    """Join the others for the length of a run.

    Args:
        config: the axes; with one process there is nothing to join.
        device: where this process computes.
        run: what must be the same on every rank, such as the configuration.

    Raises:
        InputError: the port is taken, a rank cannot reach the others, or a rank has another configuration or version.
    """
    here = place()
    if here is None or here.world == 1:
        check_started(config)
        yield SingleProcess()
        return
    try:
        timeout = timedelta(seconds=config.timeout)
        store = _store(here, timeout)
        name = meet(store, here.rank, here.world, timeout=config.timeout)
        # All ranks are there: an error from here on ends all of them alike.
        check_started(config)
        # DeepSpeed reads these, the second when it is first imported.
        os.environ.setdefault("LOCAL_RANK", str(here.local_rank))
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        if device.type == "cuda":
            device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(name, store),  # type: ignore[attr-defined]
            rank=here.rank,
            world_size=here.world,
            timeout=timeout,
        )
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        # Rank 0 misses the same ranks, and says so.
        raise EverywhereError(
            f"the {here.world} processes could not meet at {here.master}:{here.port} ({reason}): "
            "free the port or set MASTER_PORT to another, and start all of them"
        ) from None
    try:
        processes = LaunchedProcesses(device)
        with processes.together():
            _check_alike(run)
        yield processes
    finally:
        dist.destroy_process_group()
        if device.type != "cuda":
            time.sleep(SECONDS_TO_LET_GO)


def _store(here: Place, timeout: timedelta) -> Store:
    """The launcher's store, where it says so, else one that rank 0 serves."""
    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    made: Future[Store] = Future()

    def make() -> None:
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                here.master,
                int(here.port),
                is_master=here.rank == 0 and not launchers,
                timeout=timeout,
                wait_for_workers=False,
            )
            made.set_result(store)
        except Exception as error:
            made.set_exception(error)

    # In a thread that nobody joins: where something else listens and does not answer, torch waits for ever.
    threading.Thread(target=make, daemon=True).start()
    seconds = timeout.total_seconds()
    try:
        return made.result(seconds + 1)
    except TimeoutError:
        raise RuntimeError(f"what listens there did not answer within {seconds:.0f} s") from None


def _version() -> str:
    try:
        return version("stabilitylab")
    except PackageNotFoundError:
        return "not installed"


def _check_alike(run: str) -> None:
    mine = {
        "configuration": hashlib.sha256(run.encode()).hexdigest()[:12],
        "torch": torch.__version__,
        "stabilitylab": _version(),
    }
    all_of_them: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    for rank, theirs in enumerate(all_of_them):
        for what, value in theirs.items():
            if value != all_of_them[0][what]:
                raise InputError(
                    f"rank {rank} has another {what} than rank 0 ({value}, not {all_of_them[0][what]}): "
                    "start all ranks with the same command and the same installation"
                )

"""Checkpoints of several processes: all ranks at once write whole tensors under the model's own names.

    save   one of its holders puts each tensor together and writes it (glm.train.async_checkpoint)
    load   each rank reads the tensors of which it holds some, and keeps its share

The layout is ``glm.train.checkpoint``'s, so any topology, the local engine included, reads what any other wrote; weights and
moments are the same bits. ``writers`` gives each rank about as much to write as any other. A failure on one rank, such as a full
disk, fails the save on all. Training waits while the ranks put the tensors together, over the run's own groups, and not for the
writing.

Limits: all ranks must see the same folder, such as a network file system.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from glm.distributed.process_group import ProcessGroup
from glm.errors import InputError
from glm.parallel.partition import Share
from glm.train import checkpoint as checkpoints
from glm.train.async_checkpoint import CheckpointWriter
from glm.train.checkpoint import Checkpoint


def writers(shares: Mapping[str, Share]) -> dict[str, int]:
    """The rank that writes each tensor: the holder with least to write so far."""
    load: dict[int, int] = {}
    chosen = {}
    for name, share in shares.items():
        chosen[name] = min(share.ranks(), key=lambda rank: (load.get(rank, 0), rank))
        load[chosen[name]] = load.get(chosen[name], 0) + share.shape.numel()
    return chosen


def begin_save(
    folder: Path,
    checkpoint: Checkpoint,
    shares: Mapping[str, Share],
    processes: ProcessGroup,
    *,
    background: bool,
) -> CheckpointWriter:
    """Put together this rank's tensors of a checkpoint, and begin to write them.

    Args:
        folder: of the run's checkpoints.
        checkpoint: this rank's shares; the checkpoint has the lead's state.
        shares: of every parameter of the whole model; the rest of ``checkpoint.model`` is alike on all ranks, and the first
            writes it.
        processes: the ranks.
        background: write in another thread.

    Raises:
        OSError: a rank's disk is full: on every rank.
    """
    rank = dist.get_rank()
    model, optimizer = _assembled(checkpoint, shares, rank)
    files = {f"model-{rank:05d}.safetensors": model, f"optimizer-{rank:05d}.safetensors": optimizer}
    return CheckpointWriter(folder, checkpoint, files, processes, background=background)


def _assembled(
    checkpoint: Checkpoint, shares: Mapping[str, Share], rank: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The whole tensors that this rank writes: weights, and moments."""
    model, optimizer = {}, {}
    moments: dict[str, list[str]] = {}
    for key in checkpoint.optimizer:
        moment, _, name = key.partition("/")
        moments.setdefault(name, []).append(moment)
    if rank == 0:
        model = {
            name: tensor.detach().cpu().clone()
            for name, tensor in checkpoint.model.items()
            if name not in shares
        }
    for name, writer in writers(shares).items():
        share = shares[name]
        if rank not in share.ranks():
            continue
        own = moments.get(name, [])
        kept = [checkpoint.model[name], *(checkpoint.optimizer[f"{moment}/{name}"] for moment in own)]
        mine = torch.stack([tensor.detach().reshape(-1) for tensor in kept])
        if rank != writer:
            if mine.numel():
                dist.send(mine, writer)
            continue
        rows = {
            holder: mine if holder == rank else _received(share, holder, mine) for holder in share.ranks()
        }
        wholes = [share.whole({holder: row[i] for holder, row in rows.items()}) for i in range(len(kept))]
        model[name] = wholes[0].cpu()
        for moment, whole in zip(own, wholes[1:], strict=True):
            optimizer[f"{moment}/{name}"] = whole.cpu()
    return model, optimizer


def _received(share: Share, holder: int, like: Tensor) -> Tensor:
    size = share.share(share.part(torch.empty(share.shape, device="meta"), holder), holder).numel()
    rows = like.new_empty((len(like), size))
    if size:
        dist.recv(rows, holder)
    return rows


def load_newest(
    folder: Path,
    shares: Mapping[str, Share],
    processes: ProcessGroup,
    moments: Mapping[str, Sequence[str]],
    copies: Mapping[str, torch.Size] = MappingProxyType({}),
) -> tuple[Checkpoint, list[str]]:
    """This rank's shares of the newest whole checkpoint, and one line about each newer one that is not whole.

    The lead verifies every byte; the others read what they need. ``moments`` names the optimizer's tensors of each parameter,
    ``copies`` has the shapes of tensors that every rank holds whole beside its shares.

    Raises:
        InputError: there is none, or it belongs to another model: on every rank.
    """
    newest: tuple[Path, list[str]] | None = None
    with processes.together():
        if processes.leads:
            newest = checkpoints.find_newest(folder)
    found = processes.from_first(newest)
    assert found is not None
    path, problems = found
    with processes.together():
        state, names = checkpoints.read_state(path)
        tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        rank = dist.get_rank()
        for kind, name, share, whole in _read(path, names, shares, rank, moments, copies):
            shape = copies[name] if share is None else share.shape
            if whole.shape != shape:
                raise InputError(
                    f"the checkpoint is of another model: {name} is {list(whole.shape)}, this model's is {list(shape)}"
                )
            own = whole if share is None else share.share(share.part(whole, rank), rank)
            tensors[kind][name] = own.clone()
    return Checkpoint(step=state.pop("step"), state=state, **tensors), problems


def _read(
    path: Path,
    names: list[str],
    shares: Mapping[str, Share],
    rank: int,
    moments: Mapping[str, Sequence[str]],
    copies: Mapping[str, torch.Size],
) -> Iterator[tuple[str, str, Share | None, Tensor]]:
    """Kind, name, share (None: all of it) and value of every tensor of which a rank holds some, one at a time.

    Raises InputError where the names are not the model's.
    """
    wanted = {
        "model": {*shares, *copies},
        "optimizer": {f"{m}/{name}" for name in shares for m in moments[name]},
    }
    for kind, expected in wanted.items():
        files = [safe_open(path / name, "pt") for name in names if name.startswith(kind)]
        held = {name: file for file in files for name in file.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
        if odd := sorted(held.keys() ^ expected):
            raise InputError(f"the checkpoint is of another model: {odd[0]} is in only one of the two")
        for name, file in held.items():
            share = shares.get(name.partition("/")[2] if kind == "optimizer" else name)
            if share is None or share.place(rank) is not None:
                yield kind, name, share, file.get_tensor(name)  # type: ignore[no-untyped-call]

"""Agreement among the processes of a run: rank 0's word counts, and one rank's failure is everybody's.

A rank that decided alone would leave the others waiting in a collective. So every decision that rests on one process only (a
signal, the detector's verdict, a full disk, a folder missing on one machine) goes through here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from glm.errors import InputError

T = TypeVar("T")


class EverywhereError(InputError):
    """An error that is the same on every process, or that all agreed on: one of them tells it."""


class EverywhereOSError(OSError):
    """The operating system refused something to one process, and all know: one of them tells it."""


class ProcessGroup(Protocol):
    """The processes of a run."""

    @property
    def leads(self) -> bool:
        """Whether this process is the one that judges, writes and speaks."""

    @property
    def forsaken(self) -> bool:
        """Whether the launcher that started this process is gone."""

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes."""

    def from_first(self, value: T) -> T:
        """The leading process's value."""

    def all_of_them(self, value: T) -> list[T]:
        """Each process's value, the leading one's first."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wrap work that may fail on one process: it then fails on all, with the first failure's message."""


class SingleProcess:
    """One process."""

    leads = True
    forsaken = False

    def any(self, flag: bool) -> bool:
        return flag

    def total(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def from_first(self, value: T) -> T:
        return value

    def all_of_them(self, value: T) -> list[T]:
        return [value]

    @contextmanager
    def together(self) -> Iterator[None]:
        yield


class LaunchedProcesses:
    """The processes of torch's default group.

    Args:
        device: of the tensors that its backend can carry.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.leads = dist.get_rank() == 0
        # The parent is torchrun's agent; a process that a shell started may outlive the shell.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def forsaken(self) -> bool:
        return self._launcher is not None and os.getppid() != self._launcher

    def any(self, flag: bool) -> bool:
        said = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said.item())

    def total(self, values: Sequence[float]) -> list[float]:
        sums = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def from_first(self, value: T) -> T:
        box = [value if self.leads else None]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]  # type: ignore[return-value]

    def all_of_them(self, value: T) -> list[T]:
        values: list[T] = [value] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        failure: InputError | OSError | None = None
        try:
            yield
        except (InputError, OSError) as error:
            failure = error
        if not self.any(failure is not None):
            return
        first = next(error for error in self.all_of_them(failure) if error is not None)
        if isinstance(first, OSError):
            raise EverywhereOSError(first.errno, first.strerror, first.filename)
        raise EverywhereError(str(first))

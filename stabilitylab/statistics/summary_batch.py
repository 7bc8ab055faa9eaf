"""Summarises many tensors together step after step, and prepares what stays the same only once.

With a few hundred small gradients the kernel is done sooner than Python can set up its jobs. So the batch keeps the kernel's jobs
in one array, and for a step with tensors of the same kind (nearly always) puts in only the addresses of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitylab.statistics import native
from stabilitylab.statistics.buffer import Buffer
from stabilitylab.statistics.summary import Summary, add_all

_STRIDED, _CPU = torch.strided, torch.device("cpu")
_PLAIN = (Tensor, torch.nn.Parameter)
_JOB: Any = np.dtype(native.TensorJob)


class SummaryBatch:
    """Summaries taken together, each of one tensor per step: a second call in a step replaces the first.

    Args:
        buffer: holds the summaries' numbers.
        summaries: without channels and tail.
    """

    def __init__(self, buffer: Buffer, summaries: Sequence[Summary]) -> None:
        self._buffer = buffer
        self._summaries = list(summaries)
        self._generation = -1
        self._kinds: list[tuple[torch.dtype, torch.Size]] = []
        self._jobs = np.empty(0, _JOB)
        self._listed = np.empty(0, np.uintp)

    def take(self, tensors: Sequence[Tensor]) -> bool:
        """Summarise ``tensors``, measurable ones, one for each summary.

        Returns:
            Whether they are of the same kind as in the step before, so that the summaries' slots are unchanged.
        """
        # The batch learns only tensors in the host's memory, and only these use the kernel.
        known = self._generation == self._buffer.generation and self._alike(tensors)
        if not known or (library := native.kernel()) is None:
            for summary in self._summaries:
                if summary.row is not None:
                    summary.row.stamp = -1
            add_all(list(zip(self._summaries, tensors, strict=True)))
            self._learn(tensors)
            return False
        self._jobs["data"] = [x.data_ptr() for x in tensors]
        library.stabilitylab_summarise(self._listed.ctypes.data, len(self._listed), torch.get_num_threads())
        stamp = self._buffer.stamp
        for summary in self._summaries:
            summary.row.stamp = stamp  # type: ignore[union-attr]
        return True

    def _alike(self, tensors: Sequence[Tensor]) -> bool:
        for x, (dtype, shape) in zip(tensors, self._kinds, strict=True):
            if (
                x.dtype is not dtype
                or type(x) not in _PLAIN
                or x.layout is not _STRIDED
                or x.shape != shape
                or x.device != _CPU
                or not x.is_contiguous()
            ):
                return False
        return True

    def _learn(self, tensors: Sequence[Tensor]) -> None:
        """Copy the summaries' jobs, if the kernel took every one of these tensors."""
        self._generation = -1
        self._kinds = [(x.dtype, x.shape) for x in tensors]
        if all(x.dtype in native.DTYPES for x in tensors) and self._alike(tensors):
            self._jobs = np.frombuffer(b"".join(bytes(s.job) for s in self._summaries), _JOB).copy()
            self._jobs["fresh"] = 1
            self._listed = self._jobs.ctypes.data + np.arange(len(self._jobs), dtype=np.uintp) * _JOB.itemsize
            self._generation = self._buffer.generation

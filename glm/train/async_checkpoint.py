"""Writes checkpoints to disk while training continues.

    begin     put the present state together: training waits for this alone
    write     a thread writes the tensors, flushes them to disk and computes their checksums while training steps
    publish   when all processes have written, the leading one adds state and manifest and renames the folder into its place

These are snapshot and persist of CheckFreq (Mohan et al., FAST 2021). The thread touches files only. The training threads, which
meet in every step, agree on what the processes must agree on (all have written; one could not): writing needs no group of its own,
and no process waits for another's disk. A checkpoint appears at the end of the step in which its last process has written: a kill
before that leaves the previous one, whole, and a ``.partial`` folder that the next one removes.

To write while training continues takes a copy: 12 bytes a parameter over all processes, until it is written.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from torch import Tensor

from glm.distributed.process_group import ProcessGroup, SingleProcess
from glm.train import checkpoint as checkpoints
from glm.train.checkpoint import Checkpoint

_log = logging.getLogger("glm")
Entries = dict[str, dict[str, Any]]


class CheckpointWriter:
    """Writes one checkpoint.

    Args:
        folder: of the run's checkpoints.
        checkpoint: whose state to write; its tensors are not used.
        files: this process's tensors by file and name. They must not change before ``publish``.
        processes: all processes that write; each makes its writer at the same moment.
        background: write in another thread.

    Raises:
        OSError: one of them cannot make the folder.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        files: Mapping[str, Mapping[str, Tensor]],
        processes: ProcessGroup,
        *,
        background: bool,
    ) -> None:
        self.step = checkpoint.step
        self._folder, self._processes = folder, processes
        # The present state: observers and schedules change theirs with every step.
        self._state = checkpoints.state_text(checkpoint)
        target = partial = checkpoints.path_of(folder, checkpoint.step)
        with processes.together():
            if processes.leads:
                target, partial = checkpoints.begin(folder, checkpoint.step)
        self._target, self._partial = processes.from_first((target, partial))

        def write() -> Entries:
            return {
                name: checkpoints.write_tensors(tensors, self._partial / name)
                for name, tensors in files.items()
                if tensors
            }

        self._written = _called(write, background=background)

    @property
    def done(self) -> bool:
        """Whether this process has written its part."""
        return self._written.done()

    def publish(self, *, keep: int) -> Path:
        """Wait for all, put the checkpoint in its place, and remove all but the newest ``keep``.

        Raises:
            OSError: one of them could not write: raised on all, and nothing half-written stays behind.
        """
        with checkpoints.whole_or_absent(self._partial, self._target), self._processes.together():
            entries = self._written.result()
        everyones = self._processes.all_of_them(entries)
        with checkpoints.whole_or_absent(self._partial, self._target), self._processes.together():
            if self._processes.leads:
                files = {name: entry for one in everyones for name, entry in one.items()}
                checkpoints.finish(self._partial, self._target, self._state, files)
                checkpoints.drop_oldest(self._folder, keep=keep)
        return self._target

    def leave(self, *, keep: int) -> None:
        """Training broke off. A single process still finishes its checkpoint; several may no longer all be there to agree."""
        wait([self._written])
        if isinstance(self._processes, SingleProcess) and self._written.exception() is None:
            try:
                self.publish(keep=keep)
            except OSError as error:
                # The error that broke training off must come through, and the loop must still close observers.
                _log.warning("the checkpoint of step %d could not be written: %s", self.step, error)
        elif self._processes.leads:
            shutil.rmtree(self._partial, ignore_errors=True)


def _called(work: Callable[[], Entries], *, background: bool) -> Future[Entries]:
    """The result or error of a call, as a future."""
    if background:
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        later = thread.submit(work)
        thread.shutdown(wait=False)
        return later
    now: Future[Entries] = Future()
    try:
        now.set_result(work())
    except OSError as error:
        now.set_exception(error)
    return now

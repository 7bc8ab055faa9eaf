"""Where a monitored run goes on disk: the run folder's sinks, and at the end the explanation of its
episodes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from stabilitylab.errors import InputError
from stabilitylab.monitoring.schedule import Schedule
from stabilitylab.monitoring.sink_thread import EventLog
from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks.base import Sink

_log = logging.getLogger("stabilitylab")


class RunOutput:
    """A run folder that is being written.

    Args:
        out: a path, which is claimed, or a ``RunFolder`` that the caller has claimed.
        tensorboard: whether to write TensorBoard files beside the Parquet ones.
        recorder: hold the last so many steps in full resolution for an alarm; 0: off.
        schedule: what is written without an alarm.
    """

    def __init__(
        self, out: str | os.PathLike[str] | RunFolder, *, tensorboard: bool, recorder: int, schedule: Schedule
    ) -> None:
        from stabilitylab.sinks import ParquetSink, TensorBoardSink

        self._claimed: RunFolder | None = None
        if isinstance(out, RunFolder):
            self.run = out
        else:
            self.run = self._claimed = RunFolder(_path(out))
            self.run.claim()
        try:
            parquet: Sink = ParquetSink(self.run.telemetry)
        except BaseException:
            self.release()
            raise
        if recorder:
            parquet = _recording(parquet, recorder, schedule)
        self.sinks: list[Sink] = [EventLog(self.run), parquet]
        if tensorboard:
            self.sinks.append(TensorBoardSink(self.run.tensorboard))

    def explain(self, describe_batch: Callable[[int], list[str]] | None) -> None:
        """Say of each episode why it happened, now that everything about it is on disk."""
        try:
            from stabilitylab.spikes.explain import write_diagnoses

            write_diagnoses(self.run, describe_batch=describe_batch)
        except Exception:  # a run is not lost because it could not be explained
            _log.exception("the episodes of %s could not be explained", self.run.path)

    def release(self) -> None:
        """Give the folder back, if it was claimed here."""
        if self._claimed is not None:
            self._claimed.release()


def _path(out: str | os.PathLike[str]) -> Path:
    if not isinstance(out, (str, os.PathLike)):
        raise InputError(f"out is a {type(out).__name__}: give a path, the folder to write the run into")
    if not os.fspath(out):
        raise InputError("out is an empty path: give the folder to write the run into, or None for no folder")
    return Path(out)


def _recording(sink: Sink, keep: int, schedule: Schedule) -> Sink:
    """Every step is measured; what is not due by the schedule is held for an alarm."""
    from stabilitylab.monitoring.flight_recorder import EVERY_STEP, FlightRecorder

    seldom = 1 << 60
    every = schedule.every or seldom
    gradients = schedule.probes.get("gradients", every) or seldom
    return FlightRecorder(sink, keep=keep, every=every, cadence={**EVERY_STEP, "gradient": gradients})

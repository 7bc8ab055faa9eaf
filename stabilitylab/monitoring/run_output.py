"""A monitored run on disk: the run folder's sinks, and at the end the explanation of its episodes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from stabilitylab.command_line.whole_file import whole_file
from stabilitylab.errors import InputError
from stabilitylab.model_structure import describe
from stabilitylab.monitoring.schedule import Schedule
from stabilitylab.monitoring.sink_thread import EventLog
from stabilitylab.probes.base import Context
from stabilitylab.runs.folder import RunFolder
from stabilitylab.runs.parts import last_step
from stabilitylab.runs.places import Places
from stabilitylab.sinks.base import Sink
from stabilitylab.telemetry import Event

_log = logging.getLogger("stabilitylab")


class RunOutput:
    """A run folder being written.

    Args:
        out: a path, which ``RunOutput`` claims, or a ``RunFolder`` that the caller has claimed.
        tensorboard: whether to write TensorBoard files beside the Parquet ones.
        recorder: hold this many of the last steps in full resolution for an alarm; 0: off.
        schedule: says what to write without an alarm.
        model: the run records its structure.
    """

    def __init__(
        self,
        out: str | os.PathLike[str] | RunFolder,
        *,
        tensorboard: bool,
        recorder: int,
        schedule: Schedule,
        model: nn.Module,
    ) -> None:
        from stabilitylab.sinks import ParquetSink, TensorBoardSink

        self._claimed: RunFolder | None = None
        if isinstance(out, RunFolder):
            self.run = out
        else:
            self.run = self._claimed = RunFolder(_path(out))
            self.run.claim()
        try:
            self._structure = _described(model)
            self._write_structure()
            # From an earlier run here: the script ran before, or goes on.
            self.last_held = self._last_held()
            parquet: Sink = ParquetSink(self.run.telemetry)
        except BaseException:
            self.release()
            raise
        if recorder:
            parquet = _recording(parquet, recorder, schedule)
        self.sinks: list[Sink] = [EventLog(self.run), parquet]
        if tensorboard:
            self.sinks.append(TensorBoardSink(self.run.tensorboard, places=Places(self._structure)))

    def supersedes(self, step: int) -> Event | None:
        """Take the first step. Where the folder's run went on beyond it, this one supersedes its events and telemetry from here on;
        the event says so."""
        if self.last_held is None or self.last_held < step:
            return None
        _log.warning(
            "%s holds a run already, up to step %d: from step %d on this one takes its place",
            self.run.path,
            self.last_held,
            step,
        )
        return Event(step=step, kind="rewind", data={"reason": "a run was begun again in its folder"})

    def tell_order(self, context: Context) -> None:
        """Record the order in which the first measured step's forward pass reached the sites."""
        if context.is_ordering and context.order:
            context.is_ordering = False
            self._structure["order"] = list(context.order)
            self._write_structure()

    def _write_structure(self) -> None:
        """Write the structure whole or not at all; a full disk costs the run its order, not the run."""
        file = self.run.structure
        try:
            with whole_file(file) as partial:
                partial.write_text(json.dumps(self._structure), encoding="utf-8")
        except (OSError, InputError) as error:
            _log.warning("%s could not be written (%s): sites are read off their paths", file, error)

    def _last_held(self) -> int | None:
        """The last step in the folder; None where it holds nothing."""
        try:
            # A run's end event has the number of its steps.
            steps = [event.step for event in self.run.read_events() if event.kind != "run-end"]
            recorded = last_step(self.run.telemetry)
        except InputError:  # damaged; its readers report that
            return None
        return max([*steps, *([recorded] if recorded is not None else [])], default=None)

    def explain(self, describe_batch: Callable[[int], list[str]] | None) -> None:
        """Explain each episode, now that everything about it is on disk."""
        try:
            from stabilitylab.spikes.explain import write_diagnoses

            write_diagnoses(self.run, describe_batch=describe_batch)
        except Exception:  # a failed explanation must not lose the run
            _log.exception("the episodes of %s could not be explained", self.run.path)

    def release(self) -> None:
        """Release the folder, if claimed here."""
        if self._claimed is not None:
            self._claimed.release()


def _described(model: nn.Module) -> dict[str, Any]:
    try:
        return describe(model)
    except Exception:  # no oddity of a model may prevent watching it
        _log.exception(
            "the structure of %s could not be told: sites are read off their paths", type(model).__name__
        )
        return {}


def _path(out: str | os.PathLike[str]) -> Path:
    if not isinstance(out, (str, os.PathLike)):
        raise InputError(f"out is a {type(out).__name__}: give a path, the folder to write the run into")
    if not os.fspath(out):
        raise InputError("out is an empty path: give the folder to write the run into, or None for no folder")
    return Path(out)


def _recording(sink: Sink, keep: int, schedule: Schedule) -> Sink:
    """The sink behind a recorder: the monitor measures every step, and the recorder holds what is not due for an alarm."""
    from stabilitylab.monitoring.flight_recorder import EVERY_STEP, FlightRecorder

    seldom = 1 << 60
    every = schedule.every or seldom
    # By family, where a probe may have a cadence of its own.
    families = {"gradient": "gradients", "weight": "weights", "curvature": "curvature"}
    own = {family: schedule.probes.get(probe, every) or seldom for family, probe in families.items()}
    return FlightRecorder(sink, keep=keep, every=every, cadence={**EVERY_STEP, **own})

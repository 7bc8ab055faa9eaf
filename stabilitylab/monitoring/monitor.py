"""The monitor, which coordinates everything else: it attaches to a model, measures some steps and writes the numbers.

    with Monitor(model, optimizer, out="runs/mine", every=10) as monitor:
        for step, batch in enumerate(batches):
            loss = model(batch)
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step, loss=loss)

The loop need not pass what its optimizer, scaler and clipping reveal: the learning rate used, the loss scale, the gradient norm
before clipping (``loop_values``).

The monitor observes and never changes training: weights, random numbers and kernels are those of the run without it. Steps count
optimizer updates from 0.

A loop that dies without ``close`` loses nothing: the monitor writes what is left when the process ends, or when it is
garbage-collected. After ``close`` every call does nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stabilitylab.model_structure import bare, named_parameters
from stabilitylab.monitoring.alarms import Alarms
from stabilitylab.monitoring.collection import Collection
from stabilitylab.monitoring.lifetime import Lifetime
from stabilitylab.monitoring.loop_values import Numbers
from stabilitylab.monitoring.optimizers import Optimizers
from stabilitylab.monitoring.probe_set import ProbeSet
from stabilitylab.monitoring.rank_gather import has_process_group, several
from stabilitylab.monitoring.run_output import RunOutput
from stabilitylab.monitoring.schedule import Schedule
from stabilitylab.monitoring.sink_thread import SinkThread
from stabilitylab.monitoring.site_globs import patterns, warn_of_unmatched
from stabilitylab.monitoring.site_watch import SiteWatch
from stabilitylab.monitoring.step_queue import Detector, StepQueue, default_detector
from stabilitylab.monitoring.step_values import Values, step_number
from stabilitylab.probes.base import Context, Probe
from stabilitylab.probes.compiled import is_compiled
from stabilitylab.probes.everything import all_probes
from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks.base import Sink
from stabilitylab.sinks.trackers import names_of, open_trackers
from stabilitylab.statistics.buffer import Buffer
from stabilitylab.telemetry import LOSS, Event

_log = logging.getLogger("stabilitylab")


class Monitor:
    """Watches a model during training.

    Args:
        model: any ``nn.Module``; the monitor looks through a wrapper (DDP, ``torch.compile``).
        optimizer: one, a sequence, or None. The monitor reads rates and statistics from it, and its gradients before it steps or
            before torch clips them, unless the loop calls ``gradients_ready``. It looks through a wrapper that forwards to its
            ``optimizer`` (accelerate's).
        out: run folder to make and write (Parquet, TensorBoard, events.jsonl): a path, or a ``RunFolder`` that the caller has
            claimed. None: only ``sinks``. Where it holds a run, this one supersedes it from its own first step on.
        every: measure every n-th step; 0: record only the values that the loop passes. ``schedule`` gives finer control.
        gradients_every: a separate cadence for the gradients.
        probes: what to measure; by default ``all_probes()``.
        schedule: a ``Schedule`` instead of ``every``.
        sinks: further sinks; without ``out``, the only ones.
        trackers: experiment trackers that receive a few numbers (``sinks.tracker``): "wandb", "mlflow", "trackio".
        sites: one glob or several over module and parameter paths.
        detector: judges loss, gradient norm, rate and loss scale of every step (of the metrics that its ``loss`` and
            ``gradient_norm`` name, if it has these attributes); None for none. The monitor drops a detector that raises.
        on_event: called at once with the event in ``events.jsonl`` of each spike, divergence, non-finite value, loss-scale collapse
            or site's departure. The log gets a warning line in any case (``alarms.py``).
        parameters: the trained tensors by name, where they are not the model's own (fp32 masters of a
            half-precision model): their ``.grad`` is read.
        tensorboard: with ``out``: whether to write TensorBoard files beside the Parquet ones.
        flush_every: steps between handovers to the sinks; events go at once.
        scaler: torch's loss scaler, if the loop uses one: the monitor divides its factor out of the numbers, and also records the
            gradients of a step that the scaler skips.
        describe_batch: step -> the documents of its batch, for the diagnoses written at the end.
        group: processes whose telemetry becomes one, written by its first rank; by default all, where
            ``torch.distributed`` is running. None: this process alone. All must call ``step`` for the same
            steps.
        sharded: globs of parameters of which each tensor-parallel rank holds a shard (the monitor adds their sums), and of
            attention modules, outputs (``path``) and inputs (``path:input``) of which each has some heads or channels (it lays them
            side by side). It knows DTensor parameters (FSDP2) by itself; all others count as alike on every rank.
        scattered: globs of parameters whose every element is on exactly one rank, in whatever group (ZeRO): the monitor adds sums
            over all ranks.
        shard: the part of ``sharded`` tensors that this process holds: its tensor-parallel rank; by default its rank.
        recorder: with ``out``: measure every step, hold this many of the last steps in memory, and write them in full when an
            alarm begins; without an alarm the monitor writes only what ``every`` asks for. 0: off.

    Raises:
        InputError: an argument is invalid. The monitor then leaves no hook, no thread and no claim on the folder behind.
    """

    # Until construction is done there is nothing to close.
    _closed = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        *,
        out: str | os.PathLike[str] | RunFolder | None = None,
        every: int = 10,
        gradients_every: int | None = None,
        probes: Sequence[Probe] | None = None,
        schedule: Schedule | None = None,
        sinks: Sequence[Sink] = (),
        trackers: str | Sequence[str] = (),
        sites: str | Sequence[str] = "*",
        detector: Detector | Literal["default"] | None = "default",
        on_event: Callable[[Event], object] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        tensorboard: bool = True,
        flush_every: int = 10,
        scaler: torch.amp.GradScaler | None = None,
        describe_batch: Callable[[int], list[str]] | None = None,
        recorder: int = 0,
        group: dist.ProcessGroup | Literal["default"] | None = "default",
        sharded: str | Sequence[str] = (),
        scattered: str | Sequence[str] = (),
        shard: int | None = None,
    ) -> None:
        given, model, tracked = model, bare(model), names_of(trackers)
        cadence = {} if gradients_every is None else {"gradients": gradients_every}
        self._schedule = schedule or Schedule(every=every, probes=cadence)
        self._ranks = several(group)
        self._writes = self._ranks is None or self._ranks.rank == 0
        if shard is None:
            shard = self._ranks.rank if self._ranks is not None else 0
        self._describe_batch = describe_batch
        self._buffer = Buffer()
        self._optimizers, self._values = Optimizers(optimizer), Values()
        self._context = Context(
            model=model,
            parameters=dict(parameters) if parameters is not None else named_parameters(model),
            # Probes only read and hook it, which is all that it offers of an optimizer.
            optimizer=cast(torch.optim.Optimizer, self._optimizers) if self._optimizers else None,
            buffer=self._buffer,
            patterns=patterns(sites),
            sharded=patterns(sharded),
            scattered=patterns(scattered),
            compiled=is_compiled(given),
        )
        if self._ranks is None:  # one of several may hold only a part of the model
            warn_of_unmatched(patterns(sites), model, self._context.parameters)
        self._probe_set = ProbeSet(
            self._context,
            all_probes() if probes is None else probes,
            self._optimizers,
            scaler=scaler,
            shard=shard,
            tell=self._tell,
            alone=not has_process_group(),
        )
        self._said: set[str] = set()
        self._detector = (default_detector() if detector == "default" else detector) if self._writes else None
        self._collection = Collection(self._probe_set, self._buffer, self._ranks)
        self._last: int | None = None
        self._begun = False
        self._run_output: RunOutput | None = None
        self._probe_set.attach()
        try:
            written = self._schedule
            if recorder and out is not None:
                self._schedule = written.for_recorder(self._probe_set.costly)
            self._collection.arm(self._schedule, 0, first=True)
            if out is not None and self._writes:
                self._run_output = RunOutput(
                    out, tensorboard=tensorboard, recorder=recorder, schedule=written, model=model
                )
            own = self._own_sinks(tracked)
            told = Alarms(on_event, loss=getattr(self._detector, "loss", LOSS)) if self._writes else None
            watch = SiteWatch(self._context.order) if self._detector is not None else None
            self._sink_thread = SinkThread([*own, *sinks] if self._writes else (), watch=watch, told=told)
        except BaseException:
            self._probe_set.detach()
            if self._run_output is not None:
                self._run_output.release()
            raise
        self._queue = StepQueue(
            self._probe_set.probes,
            self._detector,
            self._sink_thread,
            alarms=self._schedule.dense_after,
            flush_every=flush_every,
            told=told,
        )
        self._closed = False
        # Ends before the sink thread's own, which began earlier.
        self._lifetime = Lifetime(self)

    # What the training loop calls.

    def start_step(self, step: int) -> None:
        """Optional: give the number of the step that begins, where it is not the last one plus one (after a resume)."""
        step = step_number(step)
        if self._open() and step != self._collection.next:
            self._arm(step)

    def gradients_ready(
        self,
        *,
        gradients: Mapping[str, Tensor] | None = None,
        norms: Mapping[str, Tensor | float] | None = None,
        scale: float = 1.0,
        loss_scale: float | None = None,
    ) -> None:
        """Read the gradients now: reduced, not yet clipped. Needed only where a loop clips without torch's functions.

        Args:
            gradients: by parameter name; by default every parameter's ``.grad``. If several calls give the same one, the last
                counts.
            norms: true L2 norms (not scaled) by parameter name, where the trainer no longer has the gradients themselves: the
                monitor then records only L2 and share of those parameters.
            scale: the factor by which ``gradients`` are larger than the true ones: a loss scale not yet divided out. The monitor
                asks its ``scaler`` itself.
            loss_scale: the factor on the loss in the step's backward passes, which gradients with respect to activations always
                hold; by default ``scale``.
        """
        if self._open():
            self._probe_set.gradients_ready(gradients, norms, scale, loss_scale)

    def step(self, step: int, **values: float | Tensor | None) -> list[Event]:
        """End the step: collect its numbers, pass them to the detector and to the sinks.

        Args:
            step: number of the optimizer update, from 0. A number not above the last one means that training went back: the monitor
                records a ``rewind`` to it.
            values: the step's own numbers, as floats, arrays or tensors of one element: ``loss``, ``gradient_norm``,
                ``learning_rate``, ``tokens``, ``seconds``, ``skipped``, ``loss_scale``, and any others. The monitor ignores None,
                and records NaN for anything that is not a number. The learning rate that the optimizer's step used takes precedence
                over one passed here, which a scheduler may already have changed; any other passed value takes precedence over what
                the monitor has seen. Values are recorded and change no measurement.

        Returns:
            The detector's events for this step; on an accelerator, for the steps whose numbers have arrived.

        Raises:
            InputError: ``step`` is not a whole number.
        """
        step = step_number(step)
        if not self._open():
            return []
        if not self._begun:
            self._begin(step)
        if self._last is not None and step <= self._last:
            reason = f"step {step} came after {self._last}"
            self._say_once(
                "rewind",
                "%s: what was recorded from step %d on is superseded, as after a return to a checkpoint; where "
                "training did not go back, count on (over epochs, once an update), or say so by monitor.rewind",
                reason,
                step,
            )
            self.event(Event(step=step, kind="rewind", data={"reason": reason}))
        self._probe_set.end()
        numbers: Numbers = dict(self._values.numbers(values).items())
        seen = self._probe_set.loop_values.numbers()
        if "learning_rate" in seen:
            numbers.pop("learning_rate", None)
        numbers = {**seen, **numbers}
        self._last = step
        if self._run_output is not None:
            self._run_output.tell_order(self._context)
        found = self._queue.add(self._collection.ended(step, numbers, alarm=self._queue.alarm))
        if self._ranks is None:
            self._collection.alarm = self._queue.alarm
        self._arm(step + 1)
        return found

    def event(self, event: Event) -> None:
        """Record something that happened: a checkpoint, a response, a rewind."""
        if not self._open():
            return
        if type(event.step) is not int:
            event = dataclasses.replace(event, step=step_number(event.step))
        if event.kind == "rewind":
            self._begun = True
            # Earlier measurements belong to the old history and must reach the sinks first.
            self._queue.settle(wait=True)
            self._queue.post()
            self._last = event.step - 1
        self._queue.event(event)

    def rewind(self, step: int, **data: Any) -> None:
        """Record that training goes back to ``step`` and continues from there: everything recorded from that step on is
        superseded."""
        step = step_number(step)
        if self._open():
            self.event(Event(step=step, kind="rewind", data=data))
            self._arm(step)

    def state_dict(self) -> dict[str, Any]:
        """The state with which a resumed run continues detection as if it had not stopped; plain JSON."""
        state: dict[str, Any] = {"last": self._last, "alarm": self._queue.alarm}
        if self._detector is not None:
            state["detector"] = self._detector.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._last = state["last"]
        self._queue.alarm = self._collection.alarm = state["alarm"]
        if self._detector is not None and "detector" in state:
            self._detector.load_state_dict(state["detector"])

    def flush(self) -> None:
        """Write everything recorded so far; returns when the sinks have it."""
        if not self._open():
            return
        self._queue.settle(wait=True)
        self._queue.post()
        self._sink_thread.wait()

    def close(self) -> None:
        """Remove every hook, write what is left, close the sinks. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._lifetime.end()
        self._probe_set.detach()
        self._queue.finish()
        self._sink_thread.close()
        if self._run_output is not None:
            if self._detector is not None:
                self._run_output.explain(self._describe_batch)
            self._run_output.release()

    @property
    def nbytes(self) -> int:
        """Memory that the monitor holds on the model's devices; on a CPU, steps not yet delivered add a copy each."""
        return self._probe_set.nbytes

    @property
    def backlog(self) -> int:
        """The number of steps that are on their way to the sinks."""
        return self._sink_thread.waiting

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed and self._lifetime.is_of_this_process:
            # It is dropped, with its model and optimizer. The process closes the sinks when it ends.
            self._lifetime.end()
            self._queue.settle(wait=True)
            self._queue.post()
            _log.warning("a monitor was dropped without close(): what it had seen is written")

    # Inside.

    def _own_sinks(self, trackers: Sequence[str]) -> list[Sink]:
        """The run folder's sinks, and the trackers'."""
        own = list(self._run_output.sinks) if self._run_output is not None else []
        if trackers and self._writes:
            own += open_trackers(trackers, self._run_output.run.path if self._run_output else None)
        return own

    def _open(self) -> bool:
        if self._closed:
            self._say_once("closed", "the monitor is closed: nothing is measured or recorded any more")
        return not self._closed

    def _begin(self, step: int) -> None:
        self._begun = True
        if self._run_output is not None and (event := self._run_output.supersedes(step)) is not None:
            self.event(event)

    def _say_once(self, subject: str, message: str, *words: object) -> None:
        if subject not in self._said:
            self._said.add(subject)
            _log.warning(message, *words)

    def _tell(self, step: int, kind: str, data: Mapping[str, Any]) -> None:
        self._queue.event(Event(step=step, kind=kind, data=data))

    def _arm(self, step: int) -> None:
        self._collection.arm(self._schedule, step)

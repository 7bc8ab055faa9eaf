"""The monitor: attach to a model, measure some steps, write what was seen. The one coordinator.

    with Monitor(model, optimizer, out="runs/mine", every=10) as monitor:
        for step, batch in enumerate(batches):
            loss = model(batch)
            loss.backward()
            monitor.gradients_ready()      # optional: before clipping
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step, loss=loss)

It observes and never changes training: weights, random numbers and kernels are those of the run without it.
Steps count optimizer updates from 0. Whether a step is measured is decided when the step before it ends, so
that the hooks of an unmeasured step need not exist.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from stabilitylab.delivery import Delivery, EventLog, Flush
from stabilitylab.errors import InputError
from stabilitylab.probes.activation_gradients import ActivationGradientProbe
from stabilitylab.probes.activations import ActivationProbe
from stabilitylab.probes.attention import AttentionProbe
from stabilitylab.probes.base import Context, Finish, Probe, Readings
from stabilitylab.probes.compiled import forget_graphs, is_compiled
from stabilitylab.probes.embedding_rows import EmbeddingRowProbe
from stabilitylab.probes.gradients import GradientProbe
from stabilitylab.probes.precision import PrecisionProbe
from stabilitylab.probes.sites import clean, unwrapped
from stabilitylab.probes.updates import UpdateProbe
from stabilitylab.schedule import Schedule
from stabilitylab.sinks.base import Sink
from stabilitylab.statistics.buffer import Buffer
from stabilitylab.statistics.transfer import Host, Slots, Transfer
from stabilitylab.telemetry import RUN_SITE, Event, Key, RunFolder

_log = logging.getLogger("stabilitylab")

# What `step` may be given under a name of its own; everything else becomes train/-/<name>.
_FAMILY = {"loss_scale": "precision"}
_WATCHED = (
    "train/-/loss",
    "train/-/gradient_norm",
    "train/-/learning_rate",
    "train/-/skipped",
    "precision/-/loss_scale",
)


class Detector(Protocol):
    """What judges a step's values as they come; ``stabilitylab.spikes.SpikeDetector`` is one."""

    def update(self, step: int, values: Mapping[str, float]) -> Sequence[Event]:
        """Events that this step's values give rise to."""

    def finish(self) -> Sequence[Event]:
        """Events for what was still open."""

    def state_dict(self) -> dict[str, Any]:
        """The detector's memory, as plain JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""


@dataclass(slots=True)
class _Ended:
    """A step that is over and whose numbers are perhaps still on their way."""

    step: int
    numbers: dict[str, float | Tensor]
    # Names of the numbers that are on an accelerator, in the order of the transfer's ``others``.
    distant: tuple[str, ...]
    transfer: Transfer | None
    finishes: list[Finish]
    gradient_norm: Callable[[Host], float] | None


def all_probes() -> list[Probe]:
    """Everything there is to measure."""
    gradients, activations = GradientProbe(), ActivationProbe()
    activation_gradients = ActivationGradientProbe()
    return [
        gradients,
        EmbeddingRowProbe(),
        activations,
        activation_gradients,
        AttentionProbe(),
        UpdateProbe(),
        PrecisionProbe(activations, activation_gradients, gradients),
    ]


class Monitor:
    """Watches a model during training.

    Args:
        model: any ``nn.Module``; a wrapper (DDP, ``torch.compile``) is looked through.
        optimizer: read for gradients (when ``gradients_ready`` is not called) and optimizer statistics; may
            be None.
        out: run folder to make and write (Parquet, TensorBoard, events.jsonl): a path, or a ``RunFolder``
            that the caller has claimed. None: only ``sinks``.
        every: measure each n-th step; 0: only the step's own values. ``schedule`` says more.
        gradients_every: another cadence for the gradients.
        probes: what to measure; by default ``all_probes()``.
        schedule: a ``Schedule`` instead of ``every``.
        sinks: further sinks, or the only ones without ``out``.
        sites: one glob or several over module and parameter paths.
        detector: judges loss, gradient norm, rate and loss scale of every step; None for no judgement.
        parameters: the trained tensors by name, where they are not the model's own (fp32 masters of a
            half-precision model): their ``.grad`` is read.
        tensorboard: with ``out``: whether to write TensorBoard files beside the Parquet ones.
        flush_every: hand over to the sinks after so many steps; events are handed over at once.
        scaler: torch's loss scaler, if one is used: numbers are recorded without its factor.
        describe_batch: step -> the documents of its batch, for the diagnoses written at the end.
        recorder: with ``out``: measure every step, hold the last so many in memory, and write them in full
            when an alarm begins; else only what ``every`` asks for is written. 0: off.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        out: str | os.PathLike[str] | RunFolder | None = None,
        every: int = 10,
        gradients_every: int | None = None,
        probes: Sequence[Probe] | None = None,
        schedule: Schedule | None = None,
        sinks: Sequence[Sink] = (),
        sites: str | Sequence[str] = "*",
        detector: Detector | Literal["default"] | None = "default",
        parameters: Mapping[str, Tensor] | None = None,
        tensorboard: bool = True,
        flush_every: int = 10,
        scaler: torch.amp.GradScaler | None = None,
        describe_batch: Callable[[int], list[str]] | None = None,
        recorder: int = 0,
    ) -> None:
        given, model = model, _unwrapped(model)
        own = {} if gradients_every is None else {"gradients": gradients_every}
        self._schedule = schedule or Schedule(every=every, probes=own)
        self._recorder = recorder
        self._detector = _default_detector() if detector == "default" else detector
        self._claimed: RunFolder | None = None
        self._run: RunFolder | None = None
        self._describe_batch = describe_batch
        self._delivery = Delivery([*self._open(out, tensorboard), *sinks])
        if recorder and out is not None:
            self._schedule = Schedule(every=1, dense_after=self._schedule.dense_after)
        self._buffer = Buffer()
        self._context = Context(
            model=model,
            parameters=dict(parameters) if parameters is not None else _named_parameters(model),
            optimizer=optimizer,
            buffer=self._buffer,
            patterns=(sites,) if isinstance(sites, str) else tuple(sites),
            compiled=is_compiled(given),
        )
        if self._context.compiled:
            forget_graphs(model)
        if probes is None:
            probes = all_probes()
        self._probes = tuple(probes)
        self._gradients = next((p for p in self._probes if isinstance(p, GradientProbe)), None)
        self._failed: set[str] = set()
        self._context.failed = self._probe_failed
        for probe in self._probes:
            probe.attach(self._context)
        self._scaler = scaler
        self._scale_slots: Slots | None = None
        self._handles = []
        if optimizer is not None:
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: self._optimizer_steps()))
        self._flush_every = flush_every
        self._flush = Flush()
        self._keys: dict[tuple[str, ...], tuple[Key, ...]] = {}
        self._pending: deque[_Ended] = deque()
        self._alarm: int | None = None
        self._last: int | None = None
        self._next: int | None = None
        self._armed: list[Probe] = []
        self._taken = False
        self._closed = False
        self._arm(0, first=True)

    def _open(self, out: str | os.PathLike[str] | RunFolder | None, tensorboard: bool) -> list[Sink]:
        if out is None:
            return []
        from stabilitylab.sinks import ParquetSink

        if isinstance(out, RunFolder):
            run = out
        else:
            run = RunFolder(Path(out))
            run.claim()
            self._claimed = run
        self._run = run
        parquet: Sink = ParquetSink(run.telemetry)
        if self._recorder:
            parquet = self._recording(parquet)
        sinks: list[Sink] = [EventLog(run), parquet]
        if tensorboard:
            with suppress(ImportError):
                from stabilitylab.sinks import TensorBoardSink

                sinks.append(TensorBoardSink(run.tensorboard))
        return sinks

    def _recording(self, sink: Sink) -> Sink:
        """Every step is measured; what is not due by the schedule is held for an alarm."""
        from stabilitylab.spikes.flight_recorder import EVERY_STEP, FlightRecorder

        seldom = 1 << 60
        every = self._schedule.every or seldom
        gradients = self._schedule.probes.get("gradients", every) or seldom
        return FlightRecorder(
            sink, keep=self._recorder, every=every, cadence={**EVERY_STEP, "gradient": gradients}
        )

    # -- the training loop's calls
    # ------------------------------------------------------------------------------------

    def start_step(self, step: int) -> None:
        """Optional: name the step that begins, where it is not the last one plus one (a resumed run's
        first)."""
        if step != self._next:
            self._arm(step)

    def gradients_ready(
        self,
        *,
        gradients: Mapping[str, Tensor] | None = None,
        norms: Mapping[str, Tensor | float] | None = None,
        scale: float | Slots = 1.0,
    ) -> None:
        """Gradients are reduced, not yet clipped: read them now.

        Args:
            gradients: by parameter name; by default every parameter's ``.grad``.
            norms: L2 norms by parameter name, true ones (not scaled), where the trainer has them but not the
                gradients themselves any more: then L2 and share are all that is recorded of those parameters.
            scale: the factor by which ``gradients`` are larger than the true ones (a loss scale not yet
                divided out).
        """
        self._taken = True
        if not self._armed:
            return
        if gradients is None:
            gradients = {n: p.grad for n, p in self._context.parameters.items() if p.grad is not None}
        for probe in self._armed:
            self._context.guarded(probe.name, probe.gradients)(gradients, norms or {}, scale)

    def step(self, step: int, **values: float | Tensor | None) -> list[Event]:
        """The step is over: collect what was seen, judge it, hand it on.

        Args:
            step: number of the optimizer update, from 0. A number not above the last one means that training
                went
                back: it is recorded as a ``rewind`` to it.
            values: the step's own numbers, as floats or tensors of one element: ``loss``, ``gradient_norm``,
                ``learning_rate``, ``tokens``, ``seconds``, ``skipped``, ``loss_scale``, and any others. None
                is left out.

        Returns:
            What the detector has to say about this step; on an accelerator, about the steps whose numbers
            have arrived.
        """
        if self._last is not None and step <= self._last:
            self.event(
                Event(step=step, kind="rewind", data={"reason": f"step {step} came after {self._last}"})
            )
        if not self._taken:
            self._read_late()
        numbers = {name: value for name, value in values.items() if value is not None}
        if isinstance(scale := numbers.get("loss_scale"), (int, float)):
            self._context.loss_scale = float(scale)
        collected = [self._context.guarded(probe.name, probe.collect)() for probe in self._armed]
        finishes = [finish for finish in collected if finish is not None]
        distant = {n: v for n, v in numbers.items() if isinstance(v, Tensor) and v.device.type != "cpu"}
        transfer = None
        if finishes:
            transfer = self._buffer.fetch(*distant.values())
        elif distant:
            transfer = Transfer({}, list(distant.values()))
        norm = self._gradients.norm_reader() if self._gradients is not None else None
        self._pending.append(_Ended(step, numbers, tuple(distant), transfer, finishes, norm))
        self._last = step
        found = self._settle()
        self._arm(step + 1)
        return found

    def event(self, event: Event) -> None:
        """Record something that happened: a checkpoint, a response, a rewind."""
        if event.kind == "rewind":
            # What was measured before belongs to the old history: it must reach the sinks first.
            self._settle(wait=True)
            self._post()
            self._last = event.step - 1
        self._flush.events.append(event)
        if event.kind in self._schedule.dense_after:
            self._alarm = event.step
        self._post()

    def rewind(self, step: int, **data: Any) -> None:
        """Training goes back to ``step`` and on from there: what was recorded for steps >= it is
        superseded."""
        self.event(Event(step=step, kind="rewind", data=data))
        self._arm(step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on judging as if it had not stopped; plain JSON."""
        state: dict[str, Any] = {"last": self._last, "alarm": self._alarm}
        if self._detector is not None:
            state["detector"] = self._detector.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._last, self._alarm = state["last"], state["alarm"]
        if self._detector is not None and "detector" in state:
            self._detector.load_state_dict(state["detector"])

    def flush(self) -> None:
        """Write everything recorded so far; returns when the sinks have it."""
        self._settle(wait=True)
        self._post()
        self._delivery.wait()

    def close(self) -> None:
        """Remove every hook, close what is open, write what is left. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for probe in self._probes:
            probe.detach()
        for handle in self._handles:
            handle.remove()
        self._settle(wait=True)
        if self._detector is not None:
            self._flush.events += self._detector.finish()
        self._post()
        self._delivery.close()
        self._explain()
        if self._claimed is not None:
            self._claimed.release()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _explain(self) -> None:
        """Say of each episode why it happened, now that everything about it is on disk."""
        if self._run is None or self._detector is None:
            return
        try:
            from stabilitylab.spikes.explain import write_diagnoses

            write_diagnoses(self._run, describe_batch=self._describe_batch)
        except Exception:  # a run is not lost because it could not be explained
            _log.exception("the episodes of %s could not be explained", self._run.path)

    # -- inside
    # -------------------------------------------------------------------------------------------------------

    def _arm(self, step: int, first: bool = False) -> None:
        # The very first step is measured whatever its number: nobody has said yet which one it is.
        self._armed = [
            probe
            for probe in self._probes
            if probe.name not in self._failed
            and self._schedule.due(probe.name, 0 if first else step, self._alarm)
        ]
        for probe in self._probes:
            probe.arm(probe in self._armed)
        self._buffer.advance()
        self._taken = False
        self._next = step
        self._context.loss_scale = self._current_scale() if self._armed else 1.0

    def _current_scale(self) -> float | Slots:
        """The loss scale of the backward pass to come: GradScaler changes it at the end of a step only."""
        if self._scaler is None or not self._scaler.is_enabled():
            return 1.0
        scale = self._scaler._scale
        if scale is None:
            return float(self._scaler._init_scale)
        if scale.device.type == "cpu":
            return float(scale)
        if self._scale_slots is None:
            self._scale_slots = self._buffer.reserve("replicated", 1, scale.device)
        self._buffer.put(self._scale_slots, scale.double())
        return self._scale_slots

    def _scaled(self) -> bool:
        """Whether GradScaler's factor is still in the gradients."""
        if self._scaler is None or self._context.optimizer is None or not self._scaler.is_enabled():
            return False
        state = self._scaler._per_optimizer_states[id(self._context.optimizer)]
        return bool(state["stage"] is OptState.READY)

    def _optimizer_steps(self) -> None:
        if not self._taken:
            self.gradients_ready()

    def _read_late(self) -> None:
        """Nobody announced the gradients and the optimizer made no step: read what is there, already
        unscaled."""
        scaler, self._scaler = self._scaler, None
        try:
            self.gradients_ready()
        finally:
            self._scaler = scaler

    def _probe_failed(self, name: str, error: Exception) -> None:
        """A probe could not do its work: it is left out from the next step on, and training goes on."""
        if os.environ.get("STABILITYLAB_STRICT") == "1":
            raise error
        if name not in self._failed:
            self._failed.add(name)
            reason = f"{type(error).__name__}: {error}"
            _log.warning(
                "telemetry lost: the probe %s failed (%s); training goes on without it", name, reason
            )
            lost = Event(step=self._next or 0, kind="telemetry-lost", data={"probe": name, "reason": reason})
            self._flush.events.append(lost)

    def _settle(self, *, wait: bool = False) -> list[Event]:
        """Take the ended steps whose numbers have arrived, in order: judge them and put them into the
        flush."""
        found: list[Event] = []
        while self._pending:
            ended = self._pending[0]
            if ended.transfer is not None:
                if wait:
                    ended.transfer.wait()
                elif not ended.transfer.ready():
                    break
            self._pending.popleft()
            found += self._take(ended)
        if found or len(self._flush.readings) >= self._flush_every:
            self._post()
        return found

    def _take(self, ended: _Ended) -> list[Event]:
        arrived = ended.transfer.others() if ended.transfer is not None else []
        distant = dict(zip(ended.distant, arrived, strict=True))
        numbers = {name: _number(distant.get(name, value)) for name, value in ended.numbers.items()}
        if ended.finishes and ended.transfer is not None:
            host = ended.transfer.host()
            self._flush.unfinished.append((ended.step, host, ended.finishes))
            if "gradient_norm" not in numbers and ended.gradient_norm is not None:
                numbers["gradient_norm"] = ended.gradient_norm(host)
        if "skipped" in numbers:
            numbers[f"precision/{RUN_SITE}/skipped"] = numbers["skipped"]
        names = tuple(numbers)
        keys = self._keys.get(names)
        if keys is None:
            keys = self._keys[names] = tuple(_key(name) for name in names)
        values = np.array(list(numbers.values()), dtype=np.float64)
        self._flush.readings.append((ended.step, Readings(keys, values)))
        return self._judge(ended.step, keys, numbers)

    def _judge(self, step: int, keys: Sequence[Key], numbers: Mapping[str, float]) -> list[Event]:
        if self._detector is None:
            return []
        named = {key.metric: value for key, value in zip(keys, numbers.values(), strict=True)}
        watched = {metric: named[metric] for metric in _WATCHED if metric in named}
        events = list(self._detector.update(step, watched))
        self._flush.events += events
        if any(event.kind in self._schedule.dense_after for event in events):
            self._alarm = step
        return events

    def _post(self) -> None:
        if self._flush.readings or self._flush.events or self._flush.unfinished:
            self._delivery.post(self._flush)
            self._flush = Flush()


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _key(name: str) -> Key:
    if "/" in name:
        return Key.parse(name)
    return Key(_FAMILY.get(name, "train"), RUN_SITE, name)


def _named_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {clean(name): parameter for name, parameter in model.named_parameters()}


def _default_detector() -> Detector | None:
    try:
        from stabilitylab.spikes import SpikeDetector
    except ImportError:
        return None
    return SpikeDetector()


def _unwrapped(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}: the monitor attaches to a torch.nn.Module")
    while True:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else unwrapped(model)
        if inner is model:
            return model
        model = inner

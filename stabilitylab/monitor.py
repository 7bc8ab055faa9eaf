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
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabilitylab.arrivals import Arrivals, Detector, Ended
from stabilitylab.delivery import Delivery
from stabilitylab.loss_scale import LossScale
from stabilitylab.output import Output
from stabilitylab.probes.base import Context, Placing, Probe
from stabilitylab.probes.compiled import forget_graphs, is_compiled
from stabilitylab.probes.everything import all_probes
from stabilitylab.probes.sites import bare, named_parameters
from stabilitylab.ranks import Ranks
from stabilitylab.schedule import Schedule
from stabilitylab.sinks.base import Sink
from stabilitylab.statistics.buffer import Buffer, Slots
from stabilitylab.statistics.transfer import Transfer
from stabilitylab.telemetry import Event, RunFolder

_log = logging.getLogger("stabilitylab")


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
        group: processes whose telemetry becomes one, written by its first rank; by default all, where
            ``torch.distributed`` is running. None: this process alone. All must call ``step`` for the same
            steps.
        sharded: globs of parameters of which each tensor-parallel rank holds a shard (their sums are added),
            and of attention modules, outputs (``path``) and inputs (``path:input``) of which each has some of
            the heads or channels (they are laid side by side). DTensor parameters (FSDP2) are known to be;
            all others count as alike on every rank.
        scattered: globs of parameters of which every element is on one rank only, whatever else the rank is
            (ZeRO): sums are added over all ranks.
        shard: which part of what is ``sharded`` this process holds: its tensor-parallel rank; by default its
            rank.
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
        group: dist.ProcessGroup | Literal["default"] | None = "default",
        sharded: str | Sequence[str] = (),
        scattered: str | Sequence[str] = (),
        shard: int | None = None,
    ) -> None:
        given, model = model, bare(model)
        own = {} if gradients_every is None else {"gradients": gradients_every}
        self._schedule = schedule or Schedule(every=every, probes=own)
        self._ranks = _ranks(group)
        self._writes = self._ranks is None or self._ranks.rank == 0
        if shard is None:
            shard = self._ranks.rank if self._ranks is not None else 0
        self._output: Output | None = None
        if out is not None and self._writes:
            self._output = Output(out, tensorboard=tensorboard, recorder=recorder, schedule=self._schedule)
        if recorder and out is not None:
            self._schedule = Schedule(every=1, dense_after=self._schedule.dense_after)
        self._describe_batch = describe_batch
        self._buffer = Buffer()
        self._context = Context(
            model=model,
            parameters=dict(parameters) if parameters is not None else named_parameters(model),
            optimizer=optimizer,
            buffer=self._buffer,
            patterns=_patterns(sites),
            sharded=_patterns(sharded),
            scattered=_patterns(scattered),
            compiled=is_compiled(given),
            failed=self._probe_failed,
        )
        if self._context.compiled:
            forget_graphs(model)
        self._probes = tuple(all_probes() if probes is None else probes)
        self._placing = {probe.name: Placing(self._context.is_sharded, shard) for probe in self._probes}
        self._failed: set[str] = set()
        self._detector = (
            (_default_detector() if detector == "default" else detector) if self._writes else None
        )
        self._delivery = Delivery(
            [*(self._output.sinks if self._output is not None else ()), *sinks] if self._writes else ()
        )
        self._arrivals = Arrivals(
            self._probes,
            self._detector,
            self._delivery,
            alarms=self._schedule.dense_after,
            flush_every=flush_every,
        )
        for probe in self._probes:
            probe.attach(self._context)
        self._scale = LossScale(scaler, optimizer, self._buffer)
        self._handles: list[RemovableHandle] = []
        if optimizer is not None:
            self._handles += [
                optimizer.register_step_pre_hook(self._optimizer_begins),
                optimizer.register_step_post_hook(self._optimizer_ends),
            ]
        # The step of the last alarm that all ranks know of.
        self._alarm: int | None = None
        self._last: int | None = None
        self._next: int | None = None
        self._due = False
        self._armed: list[Probe] = []
        self._taken = False
        self._closed = False
        self._arm(0, first=True)

    # What the training loop calls.

    def start_step(self, step: int) -> None:
        """Optional: name the step that begins, where it is not the last one plus one (after a resume)."""
        if step != self._next:
            self._arm(step)

    def gradients_ready(
        self,
        *,
        gradients: Mapping[str, Tensor] | None = None,
        norms: Mapping[str, Tensor | float] | None = None,
        scale: float = 1.0,
    ) -> None:
        """Gradients are reduced, not yet clipped: read them now.

        Args:
            gradients: by parameter name; by default every parameter's ``.grad``.
            norms: L2 norms by parameter name, true ones (not scaled), where the trainer has them but not the
                gradients themselves any more: then L2 and share are all that is recorded of those parameters.
            scale: the factor by which ``gradients`` are larger than the true ones: a loss scale not yet
                divided out. A ``scaler`` given to the monitor is asked itself.
        """
        self._taken = True
        if not self._armed:
            return
        if scale != 1.0:
            self._context.loss_scale = scale
        scaled = scale != 1.0 or self._scale.in_gradients()
        self._read(gradients, norms or {}, self._context.loss_scale if scaled else 1.0)

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
        if not self._taken and self._armed:
            # Nobody announced the gradients and the optimizer made no step: GradScaler found them non-finite
            # after it had unscaled them. Or there is no optimizer.
            self._read(None, {}, 1.0)
        numbers = {name: value for name, value in values.items() if value is not None}
        if isinstance(scale := numbers.get("loss_scale"), (int, float)):
            self._context.loss_scale = float(scale)
        self._last = step
        found = self._arrivals.add(self._ended(step, numbers))
        if self._ranks is None:
            self._alarm = self._arrivals.alarm
        self._arm(step + 1)
        return found

    def event(self, event: Event) -> None:
        """Record something that happened: a checkpoint, a response, a rewind."""
        if event.kind == "rewind":
            # What was measured before belongs to the old history: it must reach the sinks first.
            self._arrivals.settle(wait=True)
            self._arrivals.post()
            self._last = event.step - 1
        self._arrivals.event(event)

    def rewind(self, step: int, **data: Any) -> None:
        """Training goes back to ``step`` and on from there: what was recorded from it on is superseded."""
        self.event(Event(step=step, kind="rewind", data=data))
        self._arm(step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on judging as if it had not stopped; plain JSON."""
        state: dict[str, Any] = {"last": self._last, "alarm": self._arrivals.alarm}
        if self._detector is not None:
            state["detector"] = self._detector.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._last, self._alarm = state["last"], state["alarm"]
        self._arrivals.alarm = self._alarm
        if self._detector is not None and "detector" in state:
            self._detector.load_state_dict(state["detector"])

    def flush(self) -> None:
        """Write everything recorded so far; returns when the sinks have it."""
        self._arrivals.settle(wait=True)
        self._arrivals.post()
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
        self._arrivals.finish()
        self._delivery.close()
        if self._output is not None:
            if self._detector is not None:
                self._output.explain(self._describe_batch)
            self._output.release()

    @property
    def nbytes(self) -> int:
        """Memory that the monitor holds on the model's devices; on a CPU, steps that are not yet delivered come
        on top, each with a copy."""
        return self._buffer.nbytes + sum(getattr(probe, "nbytes", 0) for probe in self._probes)

    @property
    def backlog(self) -> int:
        """Steps that are handed over and not yet with the sinks."""
        return self._delivery.waiting

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Inside.

    def _arm(self, step: int, first: bool = False) -> None:
        # The very first step is measured whatever its number: nobody has said yet which one it is.
        due = [p for p in self._probes if self._schedule.due(p.name, 0 if first else step, self._alarm)]
        self._due = bool(due)
        self._armed = [probe for probe in due if probe.name not in self._failed]
        for probe in self._probes:
            probe.arm(probe in self._armed)
        self._buffer.advance()
        self._taken = False
        self._next = step
        self._context.loss_scale = self._scale.coming() if self._armed else 1.0

    def _read(
        self,
        gradients: Mapping[str, Tensor] | None,
        norms: Mapping[str, Tensor | float],
        scale: float | Slots,
    ) -> None:
        if gradients is None:
            gradients = {n: g for n, p in self._context.parameters.items() if (g := p.grad) is not None}
        for probe in self._armed:
            self._context.guarded(probe.name, probe.gradients)(gradients, norms, scale)

    def _ended(self, step: int, numbers: dict[str, float | Tensor]) -> Ended:
        """Collect what the probes found and set it on its way to the host."""
        found = [(p, self._context.guarded(p.name, p.collect)()) for p in self._armed]
        self._buffer.compact()
        manifest = tuple(
            (p.name, self._placing[p.name].seen(f, self._buffer)) for p, f in found if f is not None
        )
        distant = {n: v for n, v in numbers.items() if isinstance(v, Tensor) and v.device.type != "cpu"}
        ended = Ended(step=step, numbers=numbers, distant=tuple(distant), manifest=manifest)
        parts = self._buffer.parts() if manifest else []
        if self._ranks is not None and self._due:
            ended.received = self._ranks.exchange(manifest, parts, self._arrivals.alarm)
            self._alarm = ended.received.alarm
            parts = []
            if not self._writes:
                ended.received, ended.manifest = None, ()
        if parts or distant:
            ended.transfer = Transfer(parts, list(distant.values()))
        return ended

    def _optimizer_begins(self, optimizer: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        # With a closure the backward pass is still to come, inside the step.
        if not self._taken and not any(callable(argument) for argument in (*args, *kwargs.values())):
            self.gradients_ready()

    def _optimizer_ends(self, optimizer: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if not self._taken:
            self.gradients_ready()

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
            lost = {"probe": name, "reason": reason}
            self._arrivals.event(Event(step=self._next or 0, kind="telemetry-lost", data=lost))


def _ranks(group: dist.ProcessGroup | Literal["default"] | None) -> Ranks | None:
    if group is None or not dist.is_available() or not dist.is_initialized():
        return None
    ranks = Ranks(None if group == "default" else group)
    return ranks if ranks.size > 1 else None


def _patterns(globs: str | Sequence[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _default_detector() -> Detector:
    from stabilitylab.spikes import SpikeDetector

    return SpikeDetector()

"""Trains forks of one state of a loop, each without one thing, one after the other in this process.

A fork begins from a copy of the state and trains up to the yardstick's end, or ends earlier once it is decided. It is the same to
the last bit, whatever the process trained before.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stabilitylab.attribution import fork_verdicts
from stabilitylab.attribution.ablation import Without
from stabilitylab.attribution.fork_verdicts import ForkVerdict, Yardstick
from stabilitylab.attribution.interventions import (
    Act,
    BoundUpdates,
    ClipNorm,
    ClipTensors,
    HoldRows,
    HoldUpdates,
    LeaveOutBatch,
    LeaveOutRows,
    Optimizer,
    OtherData,
    RenewFirstMoments,
    RenewSecondMoments,
    ScaleRate,
    ShrinkGradient,
)
from stabilitylab.attribution.loop import Loop, LoopState, Subject
from stabilitylab.attribution.module_interventions import (
    BoundOutputGradients,
    BoundOutputs,
    BoundScores,
    FullPrecision,
)
from stabilitylab.attribution.observation import Observation
from stabilitylab.attribution.undo_changes import KeepSettings, PutBack
from stabilitylab.errors import InputError


@dataclass(frozen=True)
class Usual:
    """The usual values that interventions compare with: sizes by site, scores by call of attention."""

    gradients: Mapping[str, float]
    outputs: Mapping[str, float]
    output_gradients: Mapping[str, float]
    scores: Mapping[int, torch.Tensor]
    callers: Mapping[int, str]

    @classmethod
    def of(cls, seen: Observation) -> Usual:
        """The usual values of the control."""
        return cls(
            gradients=seen.usual(seen.gradients),
            outputs=seen.usual(seen.outputs),
            output_gradients=seen.usual(seen.output_gradients),
            scores=seen.usual_scores(),
            callers=seen.callers,
        )


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A fork's outcome.

    Attributes:
        without: what it leaves out.
        values: the signal from the fork's first step on; shorter where decided early.
        verdict: see ``fork_verdicts.py``.
        seconds: that training took.
        error: why it did not train; "" if it did.
    """

    without: Without
    values: tuple[float, ...]
    verdict: ForkVerdict
    seconds: float
    error: str = ""


class Forks:
    """Trains forks of ``state``.

    Args:
        loop: training moves it; it does not come back to its step.
        state: where forks begin.
        signal: name of the step's number that the event is about.
    """

    def __init__(self, loop: Loop, state: LoopState, *, signal: str = "loss") -> None:
        self.loop, self.state, self.signal = loop, state, signal
        self.subject = Subject(loop)
        self.yardstick: Yardstick | None = None
        self.usual: Usual | None = None

    @property
    def begin(self) -> int:
        """The step at which forks begin."""
        return self.state.index

    def control(self, steps: int, watch: Act | None = None, *, onset: int | None = None) -> list[float]:
        """The signal of ``steps`` steps with nothing left out. Where a loop raises at ``onset`` or later (for example at a NaN
        loss), that is the event: the signal ends there with NaN.
        """
        values: list[float] = []
        try:
            self._train(Without(), watch or Act(), self.begin + steps, lambda values: False, values)
        except Exception:
            if onset is None or self.begin + len(values) < onset:
                raise
            values.append(math.nan)
        return values

    def train(self, without: Without) -> Fork:
        """Train one fork and judge it."""
        assert self.yardstick is not None
        began, of = time.perf_counter(), self.yardstick
        values: list[float] = []
        try:
            self._train(
                without, self._act(without), of.end, lambda seen: fork_verdicts.is_decided(of, seen), values
            )
        except InputError:
            raise
        except Exception as error:
            # A step that an intervention makes impossible (a row too few, a kernel without fp32) costs only its own fork, whatever
            # the loop raises.
            failed = ForkVerdict(word=fork_verdicts.FAILED, height=math.nan, area=math.nan)
            said = " ".join(str(error).split())[:200]
            return Fork(
                without=without, values=(), verdict=failed, seconds=time.perf_counter() - began, error=said
            )
        return Fork(
            without=without,
            values=tuple(values),
            verdict=fork_verdicts.verdict(of, values),
            seconds=time.perf_counter() - began,
        )

    def _train(
        self,
        without: Without,
        act: Act,
        end: int,
        decided: Callable[[list[float]], bool],
        values: list[float],
    ) -> None:
        """Append the signal of each step to ``values``."""
        self.state.put_into(self.loop)
        subject = self.subject
        handles: list[Any] = []
        begun = False

        def forward(module: Any, args: Any) -> None:
            nonlocal begun
            if not begun:
                begun = True
                act.forward(subject)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if subject.acts:
                act.before(subject, optimizer)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # Also after the last step in which it acts: the step's own hook puts back what the act put aside.
            if subject.acts:
                act.after(subject, optimizer)

        try:
            act.install(subject)
            # Whichever module runs first: a loop may call another method of its model than forward.
            handles += [module.register_forward_pre_hook(forward) for module in subject.model.modules()]
            for optimizer in subject.optimizers:
                handles += [
                    optimizer.register_step_pre_hook(before),
                    optimizer.register_step_post_hook(after),
                ]
            mode = getattr(act, "mode", None)
            for step in range(self.begin, end):
                subject.step, begun = step, False
                subject.acts = without.acts_at(step) or not without.kind
                act.start(subject)
                with mode if mode is not None else contextlib.nullcontext():
                    seen = self._one_step(act, step)
                values.append(signal_of(seen, self.signal))
                if decided(values):
                    break
        finally:
            for handle in handles:
                handle.remove()
            act.remove()

    def _one_step(self, act: Act, step: int) -> float | Mapping[str, float]:
        index = act.index(self.subject, step)
        rows = act.rows(self.subject, step) if self.subject.acts else ()
        if rows:
            return without_rows(self.loop, index, rows)
        return self.loop.train_step(index)

    def _act(self, without: Without) -> Act:
        usual = self.usual
        assert usual is not None
        sites, names = without.sites, tuple(self.subject.parameters)
        match without.kind:
            case "":
                return Act()
            case "updates":
                return HoldUpdates(sites)
            case "other updates":
                return HoldUpdates(set(names) - set(sites))
            case "rows of updates":
                return HoldRows(sites[0], without.rows)
            case "batch":
                return LeaveOutBatch(without.rows[0])
            case "data":
                return OtherData(without.rows[0])
            case "batch rows":
                return LeaveOutRows(without.rows[0], without.rows[1:])
            case "outside weights":
                return PutBack(weights=sites, rows=without.rows)
            case "outside moments":
                return PutBack(moments=sites)
            case "settings":
                return KeepSettings()
            case "rate":
                return ScaleRate(0.5)
            case "norm":
                return ClipNorm(1.0)
            case "tensor norms":
                return ClipTensors(sites, usual.gradients)
            case "stale moments":
                return BoundUpdates()
            case "past of moments":
                return RenewSecondMoments()
            case "past of momentum":
                return RenewFirstMoments()
            case "embedding gradient":
                return ShrinkGradient(sites, 0.1)
            case "rounding":
                return FullPrecision(sites)
            case "outputs":
                return BoundOutputs(sites, usual.outputs)
            case "output gradients":
                return BoundOutputGradients(sites, usual.output_gradients)
            case "scores":
                chosen = set(sites)
                return BoundScores(usual.scores, [n for n, path in usual.callers.items() if path in chosen])
        raise InputError(f"there is no intervention {without.kind!r}")


def without_rows(loop: Any, index: int, rows: Sequence[int]) -> float | Mapping[str, float]:
    """The update that ``loop`` makes without some rows of a batch."""
    made: float | Mapping[str, float] = loop.train_step_without(index, rows)
    return made


def signal_of(seen: float | Mapping[str, float], signal: str) -> float:
    """The step's number that the event is about, on the scale on which an event rises."""
    if not isinstance(seen, Mapping):
        try:
            return float(seen)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"train_step() returned a {type(seen).__name__}: it returns the step's loss"
            ) from error
    if signal not in seen:
        raise InputError(
            f"train_step() returned {', '.join(seen)} and no {signal!r}, which the event is about"
        )
    value = float(seen[signal])
    if signal == "loss":
        return value
    if signal == "loss_scale":
        return -math.log2(value) if value > 0 else math.inf
    return math.log(value) if value > 0 else (math.inf if value != value else -math.inf)

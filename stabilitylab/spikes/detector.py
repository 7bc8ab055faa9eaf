"""Spikes, seen while they begin: the online detector over the signals of a run.

    detector = SpikeDetector()
    for step in ...:
        for event in detector.update(step, {"train/-/loss": loss, "train/-/gradient_norm": norm}):
            ...
    detector.finish()

It works from the loss alone. Each value costs a few comparisons, and memory does not grow with the run. What
may come with the loss makes its verdicts better:

- *companions* (gradient norm, update RMS, attention maxima, any other positive number) are judged by their
  logarithm against their own baseline. One that left it before the loss did makes the episode a spike where
  its length alone would say hard batch: a bad batch moves loss and gradient in the same step, a bad state
  shows in the gradient first (BLOOM's gradient norm had risen fourfold four steps before its loss). Their
  leads stand in ``data["precursors"]``. The gradient norm alone makes an episode once it is four times its
  level and out for three values.
- the *loss scale* gives ``loss-scale-collapse``; and a norm that jumps by the very factor of the scale is the
  norm of the scaled gradient, and is taken as such.
- a change of the *learning rate* by half or more within the last 64 steps is noted in
  ``data["learning_rate_change"]``.
- ``skipped``: an overflow that a loss scaler (scale above 1) catches is routine: its non-finite norm is not
  an event.

NaN is a value and makes the event ``non-finite``; a value that was not logged is left out of ``values``.
Neither enters a baseline nor interrupts the watch. Values of one step may come in several calls; the second
value of a signal at a step is ignored; a step that goes back is a restart (see ``excursion.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stabilitylab.spikes.baseline import Baseline
from stabilitylab.spikes.excursion import Change, Excursions
from stabilitylab.spikes.loss_scale_collapse import ScaleWatch
from stabilitylab.telemetry import GRADIENT_NORM, LEARNING_RATE, LOSS, LOSS_SCALES, SKIPPED, Event

# Numbers of a step that say nothing of its health.
IGNORED = frozenset(f"train/-/{name}" for name in ("tokens", "targets", "seconds", "data_seconds"))

LOSS_FLOOR = 0.03
FACTOR_OF_TWO = math.log(2)
NORM_PRIOR = 0.3  # natural log: norms of fresh runs scatter by a third
NORM_FACTOR = math.log(4)
NORM_VALUES = 3
LEAD_STEPS = 64
RATE_FACTOR = 1.5


@dataclass(slots=True)
class _Burst:
    """Non-finite values in a row."""

    episode: int
    onset: int
    end: int
    seen: str


class SpikeDetector:
    """Feed it each step's numbers; it returns events as episodes begin, change their kind, and end.

    Args:
        loss: the metric that is the loss.
        gradient_norm: the metric that is the global gradient norm.
    """

    def __init__(self, *, loss: str = LOSS, gradient_norm: str = GRADIENT_NORM) -> None:
        self.loss = loss
        self.gradient_norm = gradient_norm
        self._loss = Excursions(Baseline(LOSS_FLOOR, 0.0), creep=True)
        self._companions: dict[str, Excursions] = {}
        self._left: dict[str, list[int]] = {}  # companion -> onset and last step of its latest excursion
        self._bursts: dict[str, _Burst] = {}
        self._scale = ScaleWatch()
        self._scale_signal = LOSS_SCALES[0]
        self._rate: float | None = None
        self._rate_change: tuple[int, float] | None = None
        self._episode = 0
        self._open: dict[str, int] = {}  # signal -> number of its open episode
        self._precursors: dict[str, int] = {}

    # -------------------------------------------------------------------------------------------------
    # updates

    def update(self, step: int, values: Mapping[str, float]) -> list[Event]:
        """Judge what was measured at ``step``.

        Args:
            step: the optimizer update's number.
            values: metric -> value; leave out what was not measured.
        """
        events: list[Event] = []
        skipped = bool(values.get(SKIPPED, 0.0))
        scale_ratio = 1.0
        for name in LOSS_SCALES:
            if name in values:
                scale_ratio = self._take_scale(step, name, float(values[name]), events)
        if LEARNING_RATE in values:
            self._take_rate(step, float(values[LEARNING_RATE]))
        for name, value in values.items():
            if (
                name == self.loss
                or name in IGNORED
                or name in LOSS_SCALES
                or name in (LEARNING_RATE, SKIPPED)
            ):
                continue
            if not math.isfinite(value):
                if not skipped and self._scale.scale <= 1.0:
                    events += self._take_non_finite(step, name, value)
                continue
            events += self._end_burst(step, name)
            if value > 0:
                self._take_companion(step, name, math.log(value), scale_ratio, events)
        if self.loss in values:
            value = float(values[self.loss])
            if not math.isfinite(value):
                self._loss.pass_over(step)
                events += self._take_non_finite(step, self.loss, value)
            else:
                events += self._end_burst(step, self.loss)
                events += self.tell(step, self._loss.update(step, value))
        return events

    def finish(self) -> list[Event]:
        """The run ends: close what is open."""
        events: list[Event] = []
        for name, burst in list(self._bursts.items()):
            events += self._end_burst(burst.end, name)
        for name, companion in self._companions.items():
            for change in companion.finish():
                self._companion_change(companion.last_step or 0, name, change, events)
        events += self.tell(self._loss.last_step or 0, self._loss.finish())
        if self._scale.collapsed:
            events.append(self._scale_event(self._scale.last_step or 0, "end"))
            self._scale.collapsed = False
        return events

    @property
    def loss_excursions(self) -> Excursions:
        """The loss's own state machine."""
        return self._loss

    @property
    def has_burst(self) -> bool:
        """Whether the latest value of some signal was not finite."""
        return bool(self._bursts)

    # -------------------------------------------------------------------------------------------------
    # signals

    def tell(self, step: int, changes: Sequence[Change]) -> list[Event]:
        """The events of what happened to the loss at ``step``."""
        return [self._loss_event(step, change) for change in changes]

    def _loss_event(self, step: int, change: Change) -> Event:
        now = change.excursion
        if change.phase == "onset":
            self._precursors = self._leads(now.onset)
        led = any(self._left[name][1] >= now.onset - 2 for name, lead in self._precursors.items() if lead > 0)
        if change.phase == "onset" and now.kind == "hard-batch" and led:
            now.kind = "spike"
            now.long_run = True
        extra: dict[str, Any] = {"baseline": now.level}
        if self._precursors:
            extra["precursors"] = dict(self._precursors)
        if self._rate_change is not None and 0 <= now.onset - self._rate_change[0] <= LEAD_STEPS:
            extra["learning_rate_change"] = self._rate_change[1]
        return self._event(step, self.loss, change, now.height, extra)

    def _leads(self, onset: int) -> dict[str, int]:
        """Companions out of line at or up to 64 steps before ``onset``, with their lead in steps."""
        return {
            name: onset - first
            for name, (first, last) in sorted(self._left.items())
            if 0 <= onset - last <= LEAD_STEPS or (0 <= onset - first <= LEAD_STEPS)
        }

    def _take_companion(
        self, step: int, name: str, value: float, scale_ratio: float, events: list[Event]
    ) -> None:
        companion = self._companions.get(name)
        if companion is None:
            companion = self._companions[name] = Excursions(
                Baseline(0.0, FACTOR_OF_TWO, NORM_PRIOR), creep=False
            )
        base = companion.baseline
        if scale_ratio != 1.0 and base.count:
            shift = math.log(scale_ratio)
            if abs(value - base.level - shift) < abs(value - base.level):
                base.shift(shift)
        for change in companion.update(step, value):
            self._companion_change(step, name, change, events)
        if companion.open is not None:
            self._left[name] = [companion.open.onset, companion.open.end]
            now = companion.open
            strong = now.height >= NORM_FACTOR and now.out >= NORM_VALUES
            if name == self.gradient_norm and strong and name not in self._open:
                now.kind = "spike"
                events.append(
                    self._event(step, name, Change("onset", now), now.height, {"baseline": now.level})
                )

    def _companion_change(self, step: int, name: str, change: Change, events: list[Event]) -> None:
        """Only an excursion that was told goes on being told."""
        if name in self._open and change.phase != "onset":
            now = change.excursion
            events.append(self._event(step, name, change, now.height, {"baseline": now.level}))

    def _take_non_finite(self, step: int, name: str, value: float) -> list[Event]:
        burst = self._bursts.get(name)
        if burst is not None:
            burst.end = max(burst.end, step)
            return []
        self._episode += 1
        burst = self._bursts[name] = _Burst(self._episode, step, step, str(value))
        return [self._burst_event(step, name, burst, "onset")]

    def _end_burst(self, step: int, name: str) -> list[Event]:
        burst = self._bursts.pop(name, None)
        return [] if burst is None else [self._burst_event(step, name, burst, "end")]

    def _burst_event(self, step: int, name: str, burst: _Burst, phase: str) -> Event:
        data = {
            "episode": burst.episode,
            "phase": phase,
            "signal": name,
            "onset": burst.onset,
            "peak": burst.onset,
            "end": burst.end if phase == "end" else None,
            "height": None,
            "value": burst.seen,
        }
        return Event(step=step, kind="non-finite", data=data)

    def _take_scale(self, step: int, name: str, scale: float, events: list[Event]) -> float:
        """Returns the factor by which the scale has changed."""
        before = self._scale.scale
        if not (math.isfinite(scale) and scale > 0):
            return 1.0
        self._scale_signal = name
        phase = self._scale.update(step, scale)
        if phase is not None:
            events.append(self._scale_event(step, phase))
        return scale / before if before > 0 else 1.0

    def _scale_event(self, step: int, phase: str) -> Event:
        watch = self._scale
        if phase == "onset":
            self._episode += 1
            self._open[self._scale_signal] = self._episode
        data = {
            "episode": self._open[self._scale_signal],
            "phase": phase,
            "signal": self._scale_signal,
            "onset": watch.onset,
            "peak": watch.lowest_step,
            "end": watch.lowest_step if phase == "end" else None,
            "height": watch.height,
            "established": watch.reference,
        }
        if phase == "end":
            del self._open[self._scale_signal]
        return Event(step=step, kind="loss-scale-collapse", data=data)

    def _take_rate(self, step: int, rate: float) -> None:
        if not (math.isfinite(rate) and rate > 0):
            return
        if self._rate is not None and not 1 / RATE_FACTOR < rate / self._rate < RATE_FACTOR:
            self._rate_change = (step, rate / self._rate)
        self._rate = rate

    def _event(self, step: int, name: str, change: Change, height: float, extra: Mapping[str, Any]) -> Event:
        now = change.excursion
        if change.phase == "onset":
            self._episode += 1
            self._open[name] = self._episode
        data = {
            "episode": self._open[name],
            "phase": change.phase,
            "signal": name,
            "onset": now.onset,
            "peak": now.peak,
            "end": now.end if change.phase == "end" else None,
            "height": height,
            **extra,
        }
        if change.phase == "end":
            del self._open[name]
        return Event(step=step, kind=now.kind, data=data)

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that later verdicts depend on, as JSON can hold it."""
        return {
            "loss": self._loss.state_dict(),
            "companions": {name: companion.state_dict() for name, companion in self._companions.items()},
            "left": {name: list(steps) for name, steps in self._left.items()},
            "bursts": {name: [b.episode, b.onset, b.end, b.seen] for name, b in self._bursts.items()},
            "scale": self._scale.state_dict(),
            "scale_signal": self._scale_signal,
            "rate": self._rate,
            "rate_change": None if self._rate_change is None else list(self._rate_change),
            "episode": self._episode,
            "open": dict(self._open),
            "precursors": dict(self._precursors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken."""
        self._loss.load_state_dict(state["loss"])
        self._companions = {}
        for name, saved in state["companions"].items():
            self._companions[name] = Excursions(Baseline(0.0, FACTOR_OF_TWO, NORM_PRIOR), creep=False)
            self._companions[name].load_state_dict(saved)
        self._left = {name: list(steps) for name, steps in state["left"].items()}
        self._bursts = {name: _Burst(*saved) for name, saved in state["bursts"].items()}
        self._scale = ScaleWatch(**state["scale"])
        self._scale_signal = state["scale_signal"]
        self._rate = state["rate"]
        change = state["rate_change"]
        self._rate_change = None if change is None else (change[0], change[1])
        self._episode = state["episode"]
        self._open = dict(state["open"])
        self._precursors = dict(state["precursors"])

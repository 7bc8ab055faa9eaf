"""Spikes, seen as they begin: the online detector over the signals of a run.

    detector = SpikeDetector()
    for step in ...:
        for event in detector.update(step, {"train/-/loss": loss, "train/-/gradient_norm": norm}):
            ...
    detector.finish()

The loss alone is enough for it. Each value costs microseconds, and memory does not grow with the run. Other signals improve its
verdicts:

- *companions* (gradient norm, update RMS, attention maxima, any other positive number): the detector judges the logarithm of each
  against its own baseline. Where one left it before the loss did, the episode is a spike even if its length alone would say hard
  batch: a bad batch moves loss and gradient in the same step, a bad state shows in the gradient first (BLOOM's gradient norm had
  risen fourfold four steps before its loss). ``data["precursors"]`` holds their leads. The gradient norm alone makes an episode
  once it is four times its level and out for three values, unless the loss is in one already.
- the *loss scale* gives ``loss-scale-collapse``; and where the norm jumps by the very factor of the scale, the detector takes it
  for the norm of the scaled gradient.
- *causes* that the log itself shows within 64 steps before an onset: a learning rate changed by half or more, a batch size by a
  twentieth or more, another phase of the data. ``data["reason"]`` holds them as a sentence, and ``data["learning_rate_change"]`` a
  changed rate's factor.
- ``skipped``: an overflow that a loss scaler (scale above 1) catches is routine: its non-finite norm makes no event.

NaN is a value and causes the event ``non-finite``; omit a value that was not logged from ``values``. Neither enters a baseline nor
interrupts detection. A loss of exactly 0 beside a non-finite norm comes from a NaN filter, and is part of the same burst. Values of
one step may come in several calls; the detector ignores a signal's second value at a step. A step that goes back is a restart: the
detector forgets what it supersedes (see ``excursion.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from stabilitylab.spikes.baseline import Baseline
from stabilitylab.spikes.degenerate_values import HOLE, Burst, Stillness, burst_event, is_finite
from stabilitylab.spikes.excursion import Excursions
from stabilitylab.spikes.loss_scale_collapse import ScaleWatch
from stabilitylab.spikes.reasons import REASONS, Reasons
from stabilitylab.spikes.verdict import Transition
from stabilitylab.telemetry import GRADIENT_NORM, LOSS, LOSS_SCALES, SKIPPED, Event

# Numbers of a step that say nothing about its health.
IGNORED = frozenset(f"train/-/{name}" for name in ("tokens", "targets", "seconds", "data_seconds"))
_NO_COMPANIONS = IGNORED | set(LOSS_SCALES) | REASONS | {SKIPPED}

LOSS_FLOOR = 0.03
FACTOR_OF_TWO = math.log(2)
NORM_FACTOR = math.log(4)
NORM_VALUES = 3
LEAD_STEPS = 64


class SpikeDetector:
    """Takes each step's numbers and returns events as episodes begin, change their kind, and end.

    Args:
        loss: the metric that is the loss.
        gradient_norm: the metric that is the global gradient norm.
    """

    def __init__(self, *, loss: str = LOSS, gradient_norm: str = GRADIENT_NORM) -> None:
        self.loss = loss
        self.gradient_norm = gradient_norm
        self._loss = Excursions(Baseline(LOSS_FLOOR, 0.0), creep=True)
        self._stillness = Stillness()
        self._still: Burst | None = None  # the loss is dead or frozen; ``seen`` says which
        self._companions: dict[str, Excursions] = {}
        self._left: dict[str, list[int]] = {}  # companion -> onset and last step of its latest excursion
        self._bursts: dict[str, Burst] = {}
        self._scale = ScaleWatch()
        self._scale_signal = LOSS_SCALES[0]
        self._reasons = Reasons()
        self._episode = 0
        self._open: dict[str, int] = {}  # signal -> number of its open episode
        self._precursors: dict[str, int] = {}
        self._onset_reason: dict[str, Any] = {}

    # -------------------------------------------------------------------------------------------------
    # updates

    def update(self, step: int, values: Mapping[str, float]) -> list[Event]:
        """Judge the values of ``step``.

        Args:
            step: the optimizer update's number.
            values: metric -> value; only what was measured.
        """
        events: list[Event] = []
        skipped = bool(values.get(SKIPPED, 0.0))
        scale_ratio = 1.0
        if self._loss.last_step is not None and step < self._loss.last_step and self.loss in values:
            self._go_back(step)
        for name in LOSS_SCALES:
            if name in values:
                scale_ratio = self._take_scale(step, name, float(values[name]), events)
        for name in REASONS & values.keys():
            self._reasons.update(step, name, float(values[name]))
        for name, value in values.items():
            if name == self.loss or name in _NO_COMPANIONS:
                continue
            if not is_finite(value):
                if not skipped and self._scale.scale <= 1.0:
                    events += self._take_non_finite(step, name, value)
                continue
            events += self._end_burst(step, name)
            if value > 0:
                self._take_companion(step, name, math.log(value), scale_ratio, events)
        if self.loss in values:
            self._take_loss(step, float(values[self.loss]), events)
        return events

    def finish(self) -> list[Event]:
        """Close open episodes, since the run has ended."""
        events: list[Event] = []
        for name, burst in list(self._bursts.items()):
            events += self._end_burst(burst.end, name, now=True)
        if self._still is not None:
            events.append(
                self._still_event(self._still.end, self._still, "end", over=burst_is_over(self._still))
            )
            self._still = None
        for name, companion in self._companions.items():
            for change in companion.finish():
                self._companion_change(companion.last_step or 0, name, change, events)
        last = self._loss.last_step or 0
        events += self.tell(last, self._loss.finish(), over=False)
        if self._scale.collapsed:
            events.append(self._scale_event(self._scale.last_step or 0, "end"))
            self._scale.collapsed = False
        return events

    @property
    def loss_excursions(self) -> Excursions:
        """The loss's own state machine."""
        return self._loss

    def companion(self, name: str) -> Excursions:
        """A companion's state machine; exists from its first value on."""
        companion = self._companions.get(name)
        if companion is None:
            companion = self._companions[name] = Excursions(Baseline(0.0, FACTOR_OF_TWO), creep=False)
        return companion

    @property
    def stillness(self) -> Stillness:
        """The loss's counter of equal values."""
        return self._stillness

    @property
    def reasons(self) -> Reasons:
        """The changes that the log itself shows."""
        return self._reasons

    def ignores(self, name: str) -> bool:
        """Whether only a change of this signal says anything."""
        return name != self.loss and name in _NO_COMPANIONS

    def is_quiet(self, name: str) -> bool:
        """Whether nothing is going on that depends on the next ordinary value of this signal."""
        return name not in self._bursts and (name != self.loss or self._still is None)

    # -------------------------------------------------------------------------------------------------
    # signals

    def tell(self, step: int, changes: Sequence[Transition], *, over: bool = True) -> list[Event]:
        """Events for the loss's transitions at ``step``; ``over``: an end was seen, not forced."""
        return [self._loss_event(step, change, over) for change in changes]

    def _take_loss(self, step: int, value: float, events: list[Event]) -> None:
        norm_burst = self._bursts.get(self.gradient_norm)
        filtered = value == 0.0 and norm_burst is not None and norm_burst.finite == 0
        if not is_finite(value) or filtered:
            self._loss.pass_over(step)
            if not filtered:
                events += self._take_non_finite(step, self.loss, value)
            return
        events += self._end_burst(step, self.loss)
        base = self._loss.baseline
        known = base.known
        level, band = (base.level, base.band()) if known else (math.nan, math.nan)
        fine = base.quantum == 0.0 or max(base.scale1, base.ripple) > 1.5 * base.quantum
        still = self._stillness.update(step, value, level, band, fine=fine)
        if still is not None:
            self._loss.pass_over(step)
            if self._still is None:
                events += self.tell(step, self._loss.finish())
                self._episode += 1
                since = self._stillness.since
                self._still = Burst(self._episode, since, step, still, step)
                events.append(self._still_event(step, self._still, "onset"))
            self._still.end = step
            self._still.finite = 0
            return
        if self._still is not None:
            self._still.finite += 1
            if not burst_is_over(self._still):
                self._loss.pass_over(step)
                return
            events.append(self._still_event(step, self._still, "end"))
            self._still = None
        events += self.tell(step, self._loss.update(step, value))

    def _loss_event(self, step: int, change: Transition, over: bool) -> Event:
        now = change.excursion
        if change.phase == "onset":
            self._precursors = self._leads(now.onset)
            self._onset_reason = self._reasons.before(now.onset, LEAD_STEPS)
        led = any(self._left[name][1] >= now.onset - 2 for name, lead in self._precursors.items() if lead > 0)
        if change.phase == "onset" and now.kind == "hard-batch" and led:
            now.kind = "spike"
            now.long_run = True
        extra: dict[str, Any] = {**self._onset_reason}
        if self._precursors:
            extra["precursors"] = dict(self._precursors)
        return self._event(step, self.loss, change, extra, over=over)

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
        companion = self.companion(name)
        base = companion.baseline
        if scale_ratio != 1.0 and base.known:
            shift = math.log(scale_ratio)
            if abs(value - base.level - shift) < abs(value - base.level):
                base.shift(shift)
                companion.block = [x + shift for x in companion.block]
        for change in companion.update(step, value):
            self._companion_change(step, name, change, events)
        if companion.open is not None:
            now = companion.open
            self._left[name] = [now.onset, now.end]
            strong = now.height >= NORM_FACTOR and now.out >= NORM_VALUES
            told = name in self._open or self.loss in self._open
            if name == self.gradient_norm and strong and not told:
                now.kind, now.told = "spike", step
                events.append(self._event(step, name, Transition("onset", now), {}))

    def _companion_change(self, step: int, name: str, change: Transition, events: list[Event]) -> None:
        """Append a change or an end of an excursion, if its onset was told."""
        if name in self._open and change.phase != "onset":
            if change.excursion.kind == "hard-batch":
                change.excursion.kind = "spike"
            events.append(self._event(step, name, change, {}))

    def _take_non_finite(self, step: int, name: str, value: float) -> list[Event]:
        burst = self._bursts.get(name)
        if burst is not None:
            burst.end, burst.finite = max(burst.end, step), 0
            return []
        self._episode += 1
        burst = self._bursts[name] = Burst(self._episode, step, step, str(value), step)
        return [burst_event(step, name, burst, "onset")]

    def _end_burst(self, step: int, name: str, *, now: bool = False) -> list[Event]:
        burst = self._bursts.get(name)
        if burst is None:
            return []
        over = burst.finite > 0
        burst.finite += 1
        if not now and burst.finite < HOLE:
            return []
        del self._bursts[name]
        return [burst_event(step, name, burst, "end", over=over)]

    def _still_event(self, step: int, still: Burst, phase: str, *, over: bool = True) -> Event:
        event = burst_event(step, self.loss, still, phase, over=over)
        data = {**event.data, "value": self._stillness.previous, "baseline": self._loss.baseline.level}
        return Event(step=step, kind=still.seen, data=data)

    def _take_scale(self, step: int, name: str, scale: float, events: list[Event]) -> float:
        """Follow the loss scale; returns the factor by which it has changed."""
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

    def _event(
        self, step: int, name: str, change: Transition, extra: Mapping[str, Any], *, over: bool = True
    ) -> Event:
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
            "height": now.height,
            "baseline": now.level,
            "told": now.told,
            "to_the_end": change.phase == "end" and not over and now.calm == 0,
            **extra,
        }
        if change.phase == "end":
            del self._open[name]
        return Event(step=step, kind=now.kind, data=data)

    def _go_back(self, step: int) -> None:
        """Forget what happened from ``step`` on, as the run continues from there."""
        self._left = {name: steps for name, steps in self._left.items() if steps[0] < step}
        self._bursts = {name: burst for name, burst in self._bursts.items() if burst.onset < step}
        if self._still is not None and self._still.onset >= step:
            self._still = None
        self._stillness = Stillness()
        self._reasons.go_back(step)
        kept = {self._scale_signal} if self._scale.collapsed else set()
        self._open = {name: number for name, number in self._open.items() if name in kept}
        self._precursors, self._onset_reason = {}, {}

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All state that later verdicts depend on, ready for JSON."""
        return {
            "loss": self._loss.state_dict(),
            "stillness": self._stillness.state_dict(),
            "still": None if self._still is None else asdict(self._still),
            "companions": {name: companion.state_dict() for name, companion in self._companions.items()},
            "left": {name: list(steps) for name, steps in self._left.items()},
            "bursts": {name: asdict(burst) for name, burst in self._bursts.items()},
            "scale": self._scale.state_dict(),
            "scale_signal": self._scale_signal,
            "reasons": self._reasons.state_dict(),
            "episode": self._episode,
            "open": dict(self._open),
            "precursors": dict(self._precursors),
            "onset_reason": dict(self._onset_reason),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken. The detector ignores the state of an older version and starts learning
        afresh."""
        if "stillness" not in state or len(state["loss"]["baseline"]) != len(self._loss.baseline.state()):
            self._episode = state["episode"]
            return
        self._loss.load_state_dict(state["loss"])
        self._stillness = Stillness.of(state["stillness"])
        self._still = None if state["still"] is None else Burst(**state["still"])
        self._companions = {}
        for name, saved in state["companions"].items():
            self.companion(name).load_state_dict(saved)
        self._left = {name: list(steps) for name, steps in state["left"].items()}
        self._bursts = {name: Burst(**saved) for name, saved in state["bursts"].items()}
        self._scale = ScaleWatch(**state["scale"])
        self._scale_signal = state["scale_signal"]
        self._reasons = Reasons.of(state["reasons"])
        self._episode = state["episode"]
        self._open = dict(state["open"])
        self._precursors = dict(state["precursors"])
        self._onset_reason = dict(state["onset_reason"])


def burst_is_over(still: Burst) -> bool:
    """Whether the loss is alive again: it has shown two other values."""
    return still.finite >= 2

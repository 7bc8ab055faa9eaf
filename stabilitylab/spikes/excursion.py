"""One signal's excursions above its baseline, from onset to end: the state machine under the detector.

    learning --(32 values)--> quiet --(a value, a mean of four or of a block over its limit; a crept-up mean)--> out
    out      --(ordinary values in a row: two, and one more for each sixteen that were out)--> quiet

While an excursion is open the baseline rests, so an excursion cannot hide what follows. If it turns out to be no excursion of the
state (a hard batch, or noise that has grown to either side), the baseline learns from its values afterwards, so it never stays
without noise that it should know. ``onsets.py`` decides what begins an excursion, ``verdict.py`` its kind and when that changes. A
divergence that has settled (its median within a tenth since half its age, its noise as before) is closed, and the baseline learns
the new level.

Steps that go back are a restart: the state machine drops without a word what began at or after the step where the run goes on, and
restores the baseline as it was there, from snapshots that grow sparser with age. After a gap of more than 16 usual intervals it
judges an excursion by the first value after the gap, and learns the level anew where the loss has fallen; a value over the old
limit is still out, so there is no blind time after a restart.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from typing import Any

from stabilitylab.spikes.baseline import (
    BAND_SIGMAS,
    BLOCK,
    FEW_VALUES,
    GROUP,
    LEARNED_FROM,
    SHAPE_KNOWN,
    Baseline,
    median,
    ripple_of,
)
from stabilitylab.spikes.early_excursion import at_creep, at_mean, at_value
from stabilitylab.spikes.onsets import (
    UP_VALUES,
    block_is_out,
    four_are_out,
    has_jumped,
    is_out,
    three_are_up,
)
from stabilitylab.spikes.snapshots import Snapshots
from stabilitylab.spikes.verdict import (
    END_SHARE,
    FIRST_CHECK,
    HARD_STEPS,
    KEEPS_DIVERGENCE,
    KEPT_VALUES,
    Open,
    Smoothing,
    Transition,
    is_noise,
    verdict_at_end,
)

SETTLE_VALUES = 2
GAP_INTERVALS = 16
RECENT = 32


_PLAIN = ("last_step", "interval", "odd_gap", "learning", "inside", "over", "creep_onset")


class Excursions:
    """The excursions of one signal, value by value.

    Args:
        baseline: a fresh baseline with the signal's floors.
        creep: whether a mean that creeps up is an excursion; right for a loss, wrong for a norm, which may
            grow in health.
    """

    def __init__(self, baseline: Baseline, *, creep: bool) -> None:
        self.baseline = baseline
        self.creep = creep
        self.last_step: int | None = None
        self.interval = 0.0
        self.odd_gap = 0  # the latest gap that was not the usual interval
        self.learning = True  # values collect in ``block`` until there are enough to learn from as a whole
        self.inside: int | None = None  # step of the last ordinary value
        self.block: list[float] = []
        self.block_steps: list[int] = []
        self.over = 0  # runs of values over the band in this block
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.recent_steps: deque[int] = deque(maxlen=GROUP)
        self.creep_onset: int | None = None
        self.open: Open | None = None
        self.smoothing = Smoothing()
        self.snapshots = Snapshots()

    def update(self, step: int, value: float) -> list[Transition]:
        """Take a finite value. A second one for the same step is ignored."""
        gap = False
        if self.last_step is not None:
            gone = step - self.last_step
            if gone == 0:
                return []
            if gone < 0:
                self._restart(step)
            else:
                gap = bool(self.interval) and gone > GAP_INTERVALS * self.interval
                if gone != self.interval:
                    self._learn_interval(gone)
        self.last_step = step
        if self.open is None:
            return self._judge(step, value, gap)
        return self._follow(self.open, step, value, gap)

    def pass_over(self, step: int) -> None:
        """Note a step without a usable value (NaN), so that it does not count as a gap in the log."""
        if self.last_step is not None and step > self.last_step:
            self.last_step = step

    def finish(self) -> list[Transition]:
        """Give the verdict on an open excursion, since the log ends here."""
        return [] if self.open is None else [self._close(verdict_at_end(self.open))]

    def _learn_interval(self, gone: int) -> None:
        """Learn the usual interval between values: a mean over about 16, or a new gap once it has come twice."""
        if not self.interval or gone == self.odd_gap:
            self.interval = float(gone)
        else:
            self.interval += (min(gone, GAP_INTERVALS * self.interval) - self.interval) / 16
        self.odd_gap = gone

    # ------------------------------------------------------------------------------------------------- quiet

    def _judge(self, step: int, value: float, gap: bool) -> list[Transition]:
        base = self.baseline
        residual = value - base.level
        if base.known:
            if is_out(base, self.recent, residual):
                return [self._begin(step, value)]
            if gap and not self.learning and residual < -base.band():
                self._forget_block(learning=True)
            if not self.learning:
                if has_jumped(base, self.recent, value):
                    base.level = median(list(self.recent)[-GROUP:])
                    return [self._begin(step, value)]
                if four_are_out(base, self.recent, residual):
                    values = [*list(self.recent)[1 - GROUP :], value]
                    return [self._begin_at_mean(step, values, [*self.recent_steps, step][-GROUP:])]
                # Neighbours that stand out together are correlated, or an excursion in the making: no tail.
                odd = base.odd()
                if residual > odd and not (self.block and self.block[-1] - base.level > odd):
                    self.over += 1
        elif len(self.block) >= FEW_VALUES:
            rise = value - max(self.block[-FEW_VALUES:])
            if rise > 0 and rise > (limit := base.suppose(self.block)):
                # A few values may lie close together by chance: an excursion goes on while half as much would be out.
                base.scale1 = max(base.scale1, limit / (2 * BAND_SIGMAS))
                return [self._begin(step, value)]
        if base.blocks < SHAPE_KNOWN and (before := three_are_up(base, self.recent, value)) is not None:
            base.level = before
            values = [*list(self.recent)[1 - UP_VALUES :], value]
            return [self._begin_at_mean(step, values, [*self.recent_steps, step][-UP_VALUES:])]
        self._take(step, value)
        if len(self.block) < (BLOCK if base.known else LEARNED_FROM):
            return []
        if self.learning:
            base.learn_first(self.block)
            self.learning = False
            self._end_block(step)
            return []
        return self.end_block(step)

    def _take(self, step: int, value: float) -> None:
        self.inside = step
        self.block.append(value)
        self.block_steps.append(step)
        self.recent.append(value)
        self.recent_steps.append(step)

    def end_block(self, step: int) -> list[Transition]:
        """Check the mean of a full block of ordinary values; learn from the block if it is not out."""
        if block_is_out(self.baseline, self.recent, self.block):
            return [self._begin_at_mean(step, list(self.block), list(self.block_steps))]
        self.learn_block(step)
        return self._watch_creep(step) if self.creep else []

    def learn_block(self, step: int) -> None:
        """Learn from a full block of ordinary values."""
        self.baseline.exceeded(self.over)
        self.baseline.learn(self.block)
        self._end_block(step)

    def _end_block(self, step: int) -> None:
        """Forget the block, and keep the baseline for a run that comes back to this step."""
        self._forget_block()
        self.snapshots.add(step, self.baseline.state())

    def _forget_block(self, *, learning: bool = False) -> None:
        self.block, self.block_steps, self.over = [], [], 0
        self.learning = learning or (self.learning and not self.baseline.known)

    def _begin(self, step: int, value: float) -> Transition:
        now = at_value(self.baseline, step, value, self.recent, self.recent_steps, self.inside)
        if now.onset < step:
            self._keep_block_before(now.onset)
        self.open = now
        return Transition("onset", now)

    def _keep_block_before(self, onset: int) -> None:
        """Keep the part of the block before ``onset``, to learn from."""
        kept = [(s, x) for s, x in zip(self.block_steps, self.block, strict=True) if s < onset]
        self.block, self.block_steps = [x for _, x in kept], [s for s, _ in kept]

    def _begin_at_mean(self, step: int, values: list[float], steps: list[int]) -> Transition:
        self.open = at_mean(self.baseline, step, values, steps)
        if self._is_smoothed(self.open):
            self.open.kind, self.open.smoothed = "hard-batch", True
        self._keep_block_before(self.open.onset)
        return Transition("onset", self.open)

    def _watch_creep(self, step: int) -> list[Transition]:
        base = self.baseline
        crept = base.creep()
        if crept < END_SHARE:
            self.creep_onset = None
            return []
        if self.creep_onset is None:
            self.creep_onset = step
        if crept < 1.0:
            return []
        self.open = at_creep(base, step, self.creep_onset)
        self.creep_onset = None
        return [Transition("onset", self.open)]

    # ------------------------------------------------------------------------------------------------- out

    def _follow(self, now: Open, step: int, value: float, gap: bool) -> list[Transition]:
        base = self.baseline
        residual = value - now.level
        now.age += 1
        now.residuals.append(residual)
        if len(now.residuals) > KEPT_VALUES:
            del now.residuals[0]
        self.recent.append(value)
        self.recent_steps.append(step)
        band = base.band()
        if now.crept_until is None:
            # As far below as what is out above, and soon after it: the signal is wild, not back.
            out = residual > band
            now.since_high = 0 if out else now.since_high + 1
            low = residual < -band and now.since_high < GROUP
            now.low += low
            out = out or (low and residual < -base.limit() and -residual > 0.3 * now.height)
        else:
            out = sum(now.residuals[-BLOCK:]) > now.crept_until * len(now.residuals[-BLOCK:])
        if gap and not out:
            return [self._close("spike" if now.kind != "hard-batch" else "hard-batch", back=True)]
        now.count(step, residual, out=out, even=base.even)
        lasting = now.long_run or now.out > HARD_STEPS
        if now.kind == "hard-batch" and lasting:
            now.smoothed = self._is_smoothed(now)
            lasting = not now.smoothed
        if now.calm >= SETTLE_VALUES + min(now.out // BLOCK, BLOCK):
            if now.kind == "divergence" and now.stayed >= KEEPS_DIVERGENCE:
                return [self._close("divergence", back=True)]
            return [self._close("spike" if lasting else "hard-batch", back=True)]
        if now.kind == "hard-batch" and lasting:
            if is_noise(now, self.baseline):
                return [self._close("hard-batch", back=True)]
            now.kind, now.told = "spike", step
            return [Transition("change", now)]
        if now.age >= FIRST_CHECK and now.age & (now.age - 1) == 0:
            return self._check(now)
        return []

    def _is_smoothed(self, now: Open) -> bool:
        """Whether it is the trace of a hard batch in a log known to be smoothed."""
        return (
            self.smoothing.known
            and now.age < FIRST_CHECK
            and self.smoothing.explains(now.residuals, self.baseline)
        )

    def _check(self, now: Open) -> list[Transition]:
        """Check at ages 64, 128, 256, ... whether it is coming back."""
        latest = median(now.residuals[-FIRST_CHECK // 2 :])
        before, now.at_check = now.at_check, latest
        if now.age == FIRST_CHECK:
            now.first = median(now.residuals)
            if is_noise(now, self.baseline):
                return [self._close("hard-batch", back=True)]
            return []
        stays = latest >= END_SHARE * now.first
        if stays:
            now.stayed = now.age
        own = ripple_of(now.residuals)
        calm = own <= max(3 * self.baseline.sigma, 0.05 * now.first)
        if calm and abs(latest - before) <= 0.1 * abs(before):
            change = self._close("divergence" if stays else "spike")
            self._forget_block()
            self.baseline.learn_first([now.level + r for r in now.residuals[-LEARNED_FROM:]])
            self.inside = self.last_step
            return [change]
        if stays and now.kind != "divergence":
            now.kind, now.told = "divergence", self.last_step or 0
            return [Transition("change", now)]
        return []

    def _close(self, kind: str, *, back: bool = False) -> Transition:
        assert self.open is not None
        closed, self.open = self.open, None
        if kind == "divergence" and closed.kind != kind:
            closed.told = self.last_step or 0
        closed.kind = kind
        if back and closed.crept_until is None and closed.age < FIRST_CHECK and closed.out > HARD_STEPS:
            self.smoothing.learn(closed.residuals, self.baseline)
        if kind == "hard-batch":
            # Values far over the limit are another population, no tail of the noise.
            band, most = self.baseline.odd(), 1.5 * self.baseline.limit()
            self.over += not closed.smoothed and any(band < r <= most for r in closed.residuals)
            taken = closed.residuals[-closed.calm :] if closed.smoothed else closed.residuals
        else:
            taken = closed.residuals[-closed.calm :] if closed.calm else []
        if back and closed.crept_until is None:
            for r in taken:  # their own steps no longer matter
                self.block.append(closed.level + r)
                self.block_steps.append(closed.inside)
            if len(self.block) >= BLOCK and self.baseline.known:
                self.baseline.exceeded(self.over)
                if closed.age >= FIRST_CHECK:  # what the baseline learned before it is old
                    self.baseline.level = median(self.block)
                self.baseline.learn(self.block[-BLOCK:])
                self._end_block(self.last_step or closed.end)
            elif closed.age >= FIRST_CHECK:
                self._forget_block(learning=True)
        if closed.crept_until is not None:
            self._forget_block(learning=True)
        self.inside = closed.inside
        return Transition("end", closed)

    # -------------------------------------------------------------------------------------------------
    # history

    def _restart(self, step: int) -> None:
        """Take the baseline back to an earlier step, from which the run continues."""
        state = self.snapshots.before(step)
        self.open = None
        self.creep_onset = None
        self.recent.clear()
        self.recent_steps.clear()
        if state is not None:
            self.baseline.restore(state)
            self.inside = step - max(1, round(self.interval))  # a state that a run resumes from was in order
            self._forget_block()
        else:
            base = self.baseline
            self.baseline = Baseline(base.relative_floor, base.absolute_floor)
            self.inside = None
            self.learning = True
            self._forget_block()

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "baseline": list(self.baseline.state()),
            "block": list(self.block),
            "block_steps": list(self.block_steps),
            "recent": list(self.recent),
            "recent_steps": list(self.recent_steps),
            "open": None if self.open is None else asdict(self.open),
            "smoothing": asdict(self.smoothing),
            "snapshots": self.snapshots.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.baseline.restore(state["baseline"])
        self.block, self.block_steps = list(state["block"]), list(state["block_steps"])
        self.recent = deque(state["recent"], maxlen=RECENT)
        self.recent_steps = deque(state["recent_steps"], maxlen=GROUP)
        self.open = None if state["open"] is None else Open(**state["open"])
        self.smoothing = Smoothing(**state.get("smoothing", {}))
        self.snapshots = Snapshots.of(state["snapshots"])

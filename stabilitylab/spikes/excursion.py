"""One signal's excursions above its baseline, from onset to end: the state machine under the detector.

    learning --(32 values)--> quiet --(a value, a mean of four or of a block over its limit; a crept-up mean)--> out
    out      --(ordinary values in a row: two, and one more for each sixteen that were out)--> quiet

While an excursion is open the baseline rests, so an excursion can hide nothing that follows; what turns out to have
been no excursion of the state (a hard batch, or noise that has grown to either side) is learned from afterwards, so
the baseline never rests on noise that it does not know. The verdict:

- *hard-batch* while at most two values were out and each of them was followed, within the two steps that a hard
  batch may last, by an ordinary one. In a log of every fifth step a single value out may have lasted nine steps: that
  is a *spike*.
- *divergence* once, 128 values in, the latest residuals (their median) are still at least half of what the first 64
  were: how high the peak was does not matter. It stays open while it moves or is wilder than the run was before; one
  that comes back within 512 values was a spike after all. When it has settled (its median within a tenth since half
  its age, its noise as before) it is closed, and the baseline learns the new level.
- cut short by the log's end or the run going back: a divergence if three or more values were out and the last quarter
  stands at half of the median of all, else a spike; one or two values that are less than half the level high are taken
  for a hard batch, as they nearly always are.

Steps that go back are a restart: what began at or after the step where the run goes on is superseded and dropped
without a word, and the baseline is restored as it was there, from snapshots that grow sparser with age. After a gap of
more than 16 usual intervals an excursion is judged by the first value after it, and the level is learned anew where
the loss has fallen; a value over the old limit is still out: there is no blind time after a restart.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from stabilitylab.spikes.baseline import (
    BLOCK,
    FALL_SIGMAS,
    FEW_VALUES,
    GROUP,
    LEARNED_FROM,
    LIMIT_SIGMAS,
    Baseline,
    median,
    ripple_of,
)

HARD_STEPS = 2
SETTLE_VALUES = 2
FIRST_CHECK = (
    64  # ages at which an open excursion is looked at: 64, 128, 256, ...; verdicts from the second on
)
KEEPS_DIVERGENCE = 512
KEPT_VALUES = 64
GAP_INTERVALS = 16
SNAPSHOTS = 32
RECENT = 32
END_SHARE = 0.5


@dataclass(slots=True)
class Open:
    """An excursion that is going on."""

    kind: str
    onset: int
    inside: int  # the last ordinary step before the present run of values out
    level: float
    peak: int
    height: float
    end: int  # the last step out
    told: int  # the step at which it was first told as what it is
    out: int = 1  # values out so far
    low: int = 0  # values as far below the level, soon after one above
    since_high: int = 0  # values since the last one above
    long_run: bool = False  # some run of values out lasted longer than a hard batch
    calm: int = 0  # ordinary values in a row
    age: int = 1  # values since onset
    is_out: bool = True
    residuals: list[float] = field(default_factory=list)  # the latest 64
    first: float = 0.0  # median of the first 64
    at_check: float = 0.0
    stayed: int = 0  # the greatest age at which it had not come back by half
    # A mean that crept up is followed by its mean, as its single values may well be ordinary: the height at which it is
    # back. None for excursions that began with values out.
    crept_until: float | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What an update did: ``phase`` "onset", "change" or "end" of an excursion, as it stands then."""

    phase: str
    excursion: Open


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
        self.learning = True  # values go to ``block`` until there are enough to learn from as a whole
        self.inside: int | None = None  # step of the last ordinary value
        self.block: list[float] = []
        self.block_steps: list[int] = []
        self.over = 0  # runs of values over the band in this block
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.recent_steps: deque[int] = deque(maxlen=GROUP)
        self.creep_onset: int | None = None
        self.open: Open | None = None
        self.snapshots: list[tuple[int, tuple[Any, ...]]] = []

    def update(self, step: int, value: float) -> list[Change]:
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
        """A step without a usable value (NaN): it is no gap in the log."""
        if self.last_step is not None and step > self.last_step:
            self.last_step = step

    def finish(self) -> list[Change]:
        """The log ends here: give the verdict on what is still open."""
        now = self.open
        if now is None:
            return []
        if now.crept_until is not None:
            return [self._close("divergence")]
        if now.out > HARD_STEPS:
            kept = now.residuals
            last = median(kept[-max(1, len(kept) // 4) :])
            return [self._close("divergence" if last >= END_SHARE * median(kept) else "spike")]
        if now.kind == "hard-batch" and now.height < END_SHARE * abs(now.level):
            return [self._close("hard-batch")]
        return [self._close("spike")]

    def _learn_interval(self, gone: int) -> None:
        """The usual interval between values: a mean over about 16, or a new gap once it has been seen
        twice."""
        if not self.interval or gone == self.odd_gap:
            self.interval = float(gone)
        else:
            self.interval += (min(gone, GAP_INTERVALS * self.interval) - self.interval) / 16
        self.odd_gap = gone

    # ------------------------------------------------------------------------------------------------- quiet

    def _judge(self, step: int, value: float, gap: bool) -> list[Change]:
        base = self.baseline
        residual = value - base.level
        if base.known:
            if residual > base.limit() and self._is_above_noise(residual, 1):
                return [self._begin(step, value)]
            if gap and not self.learning and residual < -base.band():
                self._forget_block(learning=True)
            if not self.learning:
                if self._jumped(value):
                    base.level = median(list(self.recent)[-GROUP:])
                    return [self._begin(step, value)]
                if self._four_are_out(residual):
                    values = [*list(self.recent)[1 - GROUP :], value]
                    return [self._begin_at_mean(step, values, [*self.recent_steps, step][-GROUP:])]
                # Neighbours that stand out together are correlated, or an excursion in the making: no tail.
                if residual > base.band() and not (self.block and self.block[-1] - base.level > base.band()):
                    self.over += 1
        elif len(self.block) >= FEW_VALUES:
            rise = value - max(self.block[-FEW_VALUES:])
            if rise > 0 and rise > base.suppose(self.block):
                return [self._begin(step, value)]
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

    def _is_above_noise(self, height: float, values: int) -> bool:
        """Whether a mean of ``values`` so high stands out of the noise of the last 32 values, which may have grown."""
        ripple = ripple_of(self.recent)
        k = self.baseline.tail ** (2 if values == 1 else 1)
        return bool(height > LIMIT_SIGMAS * k * ripple / values**0.5)

    def _jumped(self, value: float) -> bool:
        """On a fall the level lags: whether ``value`` stands over the limit above the last four values instead.

        They count when all lie 2 sigma under the level, as four neighbours do once in 4 million in noise without a trend.
        """
        base, recent = self.baseline, self.recent
        if len(recent) < GROUP:
            return False
        top = max(recent[-1], recent[-2], recent[-3], recent[-4])
        rise = value - top
        if base.level - top <= FALL_SIGMAS * base.sigma or rise <= base.limit():
            return False
        return self._is_above_noise(rise, 1)

    def _four_are_out(self, residual: float) -> bool:
        """Whether the mean of the last four residuals is over its limit; on a fall, above the four and eight before."""
        base, recent = self.baseline, self.recent
        if residual <= -base.band() or len(recent) < 3 * GROUP:
            return False
        limit = base.limit_of_four()
        clip = max(3 * base.sigma * base.tail, 1.25 * limit)
        last = [recent[i] - base.level for i in range(1 - 3 * GROUP, 0)]
        mean = (min(residual, clip) + sum(min(r, clip) for r in last[1 - GROUP :])) / GROUP
        if mean <= limit:
            earlier = [max(r, -clip) for r in last[: 2 * GROUP]]
            reference = max(sum(earlier[:GROUP]), sum(earlier[GROUP:])) / GROUP
            mean -= min(0.0, reference)
        return mean > limit and self._is_above_noise(mean, GROUP)

    def end_block(self, step: int) -> list[Change]:
        """A block of ordinary values is full: is its mean out? If not, learn from it."""
        base = self.baseline
        clip = max(3 * base.sigma * base.tail, 1.5 * base.limit_of_block())
        mean = sum(min(x - base.level, clip) for x in self.block) / len(self.block)
        if mean > base.limit_of_block() and self._is_above_noise(mean, BLOCK):
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
        self.snapshots.append((step, self.baseline.state()))
        if len(self.snapshots) > SNAPSHOTS:
            # Every other one of the older three quarters goes: what is kept reaches back twice as far each time.
            old = len(self.snapshots) * 3 // 4
            self.snapshots[:old] = self.snapshots[:old:2]

    def _forget_block(self, *, learning: bool = False) -> None:
        self.block, self.block_steps, self.over = [], [], 0
        self.learning = learning or (self.learning and not self.baseline.known)

    def _begin(self, step: int, value: float) -> Change:
        inside = self.inside if self.inside is not None else step
        height = value - self.baseline.level
        self.open = Open(
            kind="hard-batch" if step - inside <= HARD_STEPS else "spike",
            onset=step,
            inside=inside,
            level=self.baseline.level,
            peak=step,
            height=height,
            end=step,
            told=step,
            residuals=[height],
        )
        return Change("onset", self.open)

    def _begin_at_mean(self, step: int, values: list[float], steps: list[int]) -> Change:
        """An excursion of means: it began where the values behind the mean rose over a third of their largest."""
        base = self.baseline
        residuals = [x - base.level for x in values]
        begin = 0
        for i, r in enumerate(residuals):
            if r <= 0.3 * max(residuals):
                begin = i + 1
            elif i >= len(residuals) - GROUP:
                break
        begin = min(begin, len(steps) - 1)
        top = max(range(begin, len(residuals)), key=residuals.__getitem__)
        inside = steps[begin - 1] if begin else steps[0]
        self.open = Open(
            kind="spike",
            onset=steps[begin],
            inside=inside,
            level=base.level,
            peak=steps[top],
            height=residuals[top],
            end=step,
            told=step,
            out=max(HARD_STEPS + 1, len(steps) - begin),
            long_run=True,
            age=len(steps) - begin,
            residuals=residuals[begin:],
        )
        # What of the block came before the onset stays to be learned from.
        kept = [(s, x) for s, x in zip(self.block_steps, self.block, strict=True) if s < steps[begin]]
        self.block, self.block_steps = [x for _, x in kept], [s for s, _ in kept]
        return Change("onset", self.open)

    def _watch_creep(self, step: int) -> list[Change]:
        base = self.baseline
        crept = base.creep()
        if crept < END_SHARE:
            self.creep_onset = None
            return []
        if self.creep_onset is None:
            self.creep_onset = step
        if crept < 1.0:
            return []
        onset, height, limit = self.creep_onset, base.slow - base.lowest, base.creep_limit()
        base.level = base.slow = base.lowest
        self.creep_onset = None
        self.open = Open(
            kind="divergence",
            onset=onset,
            inside=onset,
            level=base.level,
            peak=step,
            height=height,
            end=step,
            told=step,
            out=HARD_STEPS + 1,
            long_run=True,
            residuals=[height],
            crept_until=limit / 2,
        )
        return [Change("onset", self.open)]

    # ------------------------------------------------------------------------------------------------- out

    def _follow(self, now: Open, step: int, value: float, gap: bool) -> list[Change]:
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
        if out:
            if residual > now.height:
                now.peak, now.height = step, residual
            now.is_out, now.calm, now.end = True, 0, step
            now.out += 1
            if step - now.inside > HARD_STEPS:
                now.long_run = True
        else:
            if now.is_out and step - now.inside > HARD_STEPS + 1:
                now.long_run = True
            now.is_out, now.inside = False, step
            now.calm += 1
        lasting = now.long_run or now.out > HARD_STEPS
        if now.calm >= SETTLE_VALUES + min(now.out // BLOCK, BLOCK):
            if now.kind == "divergence" and now.stayed >= KEEPS_DIVERGENCE:
                return [self._close("divergence", back=True)]
            return [self._close("spike" if lasting else "hard-batch", back=True)]
        if now.kind == "hard-batch" and lasting:
            if self._is_noise(now):
                return [self._close("hard-batch", back=True)]
            now.kind, now.told = "spike", step
            return [Change("change", now)]
        if now.age >= FIRST_CHECK and now.age & (now.age - 1) == 0:
            return self._check(now)
        return []

    def _is_noise(self, now: Open) -> bool:
        """Whether values went as far and as often to the other side: the noise has grown, the state has not left."""
        bound = 3 * self.baseline.limit()
        return now.low >= max(1, 0.3 * now.out) and now.height < bound

    def _check(self, now: Open) -> list[Change]:
        """At ages 64, 128, 256, ...: is it coming back?"""
        latest = median(now.residuals[-FIRST_CHECK // 2 :])
        before, now.at_check = now.at_check, latest
        if now.age == FIRST_CHECK:
            now.first = median(now.residuals)
            if self._is_noise(now):
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
            return [Change("change", now)]
        return []

    def _close(self, kind: str, *, back: bool = False) -> Change:
        assert self.open is not None
        closed, self.open = self.open, None
        if kind == "divergence" and closed.kind != kind:
            closed.told = self.last_step or 0
        closed.kind = kind
        if kind == "hard-batch":
            # What is far over the limit is another population, no tail of the noise.
            band, most = self.baseline.band(), 1.5 * self.baseline.limit()
            self.over += any(band < r <= most for r in closed.residuals)
            taken = closed.residuals
        else:
            taken = closed.residuals[-closed.calm :] if closed.calm else []
        if back and closed.crept_until is None:
            for r in taken:  # their own steps no longer matter
                self.block.append(closed.level + r)
                self.block_steps.append(closed.inside)
            if len(self.block) >= BLOCK and self.baseline.known:
                self.baseline.exceeded(self.over)
                if closed.age >= FIRST_CHECK:  # what was learned before it is old
                    self.baseline.level = median(self.block)
                self.baseline.learn(self.block[-BLOCK:])
                self._end_block(self.last_step or closed.end)
            elif closed.age >= FIRST_CHECK:
                self._forget_block(learning=True)
        if closed.crept_until is not None:
            self._forget_block(learning=True)
        self.inside = closed.inside
        return Change("end", closed)

    # -------------------------------------------------------------------------------------------------
    # history

    def _restart(self, step: int) -> None:
        """The run goes on from an earlier step: so does the baseline."""
        while self.snapshots and self.snapshots[-1][0] >= step:
            self.snapshots.pop()
        self.open = None
        self.creep_onset = None
        self.recent.clear()
        self.recent_steps.clear()
        if self.snapshots:
            self.baseline.restore(self.snapshots[-1][1])
            self.inside = step - max(1, round(self.interval))  # a state that is taken up again was in order
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
            "baseline": list(self.baseline.state()),
            "last_step": self.last_step,
            "interval": self.interval,
            "odd_gap": self.odd_gap,
            "learning": self.learning,
            "inside": self.inside,
            "block": list(self.block),
            "block_steps": list(self.block_steps),
            "over": self.over,
            "recent": list(self.recent),
            "recent_steps": list(self.recent_steps),
            "creep_onset": self.creep_onset,
            "open": None if self.open is None else asdict(self.open),
            "snapshots": [[step, list(state)] for step, state in self.snapshots],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline.restore(state["baseline"])
        self.last_step = state["last_step"]
        self.interval = state["interval"]
        self.odd_gap = state["odd_gap"]
        self.learning = state["learning"]
        self.inside = state["inside"]
        self.block = list(state["block"])
        self.block_steps = list(state["block_steps"])
        self.over = state["over"]
        self.recent = deque(state["recent"], maxlen=RECENT)
        self.recent_steps = deque(state["recent_steps"], maxlen=GROUP)
        self.creep_onset = state["creep_onset"]
        self.open = None if state["open"] is None else Open(**state["open"])
        self.snapshots = [(step, tuple(values)) for step, values in state["snapshots"]]

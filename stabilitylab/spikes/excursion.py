"""One signal's excursions above its baseline, from onset to end: the state machine under the detector.

    quiet --(a value over the limit; four doubtful ones in a row; a crept-up mean)--> out
    out   --(two ordinary values in a row)--> quiet

While an excursion is open the baseline is frozen: nothing of it enters, so it can hide nothing that follows.
The verdict:

- *hard-batch* while at most two values were out and each of them was followed, within the two steps that a
  hard batch may last, by an ordinary one. In a log of every fifth step a single value out may have lasted
  nine steps: that is a *spike*.
- *divergence* once, 128 values in, less than half of the peak has been recovered. It stays open while it
  moves, and is a spike after all if it comes back; when it has settled (within a tenth since half its age) it
  is closed, and the baseline learns the new level.
- cut short, by the log's end, a gap, or the run going back: a divergence if three or more values were out and
  less than half was recovered, else a spike: a hard batch is one that has been seen to recover.

Steps that go back are a restart: the baseline is restored as it was at that step, from snapshots that grow
sparser with age. After a gap of more than 16 usual intervals the level is learned anew, but a value over the
old limit is still out: there is no blind time after a restart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from stabilitylab.spikes.baseline import Baseline

HARD_STEPS = 2
DOUBTFUL_RUN = 4
SETTLE_VALUES = 2
FIRST_CHECK = (
    64  # ages at which an open excursion is looked at: 64, 128, 256, ...; verdicts from the second on
)
GAP_INTERVALS = 16
BLOCK_VALUES = 16
SNAPSHOTS = 32
MEAN_GAIN = 1 / 8


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
    out: int = 1  # values out so far
    long_run: bool = False  # some run of values out lasted longer than a hard batch
    calm: int = 0  # ordinary values in a row
    age: int = 1  # values since onset
    mean: float = 0.0  # short exponential mean of the residual
    mean_peak: float = 0.0
    mean_at_check: float = 0.0
    is_out: bool = True
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
        self.fresh = True  # the next value begins a stretch: after a start, a restart or a gap
        self.inside: int | None = None  # step of the last ordinary value
        self.doubtful: list[tuple[int, float]] = []
        self.creep_onset: int | None = None
        self.open: Open | None = None
        self.snapshots: list[tuple[int, tuple[Any, ...]]] = []
        self.since_block = 0

    def update(self, step: int, value: float) -> list[Change]:
        """Take a finite value. A second one for the same step is ignored."""
        changes: list[Change] = []
        if self.last_step is not None:
            gone = step - self.last_step
            if gone == 0:
                return changes
            if gone < 0:
                changes += self._cut_short()
                self._restart(step)
            elif self.interval and gone > GAP_INTERVALS * self.interval:
                changes += self._cut_short()
                self._begin_stretch()
            if gone > 0 and gone != self.interval:
                self._learn_interval(gone)
        self.last_step = step
        changes += self._judge(step, value) if self.open is None else self._follow(self.open, step, value)
        return changes

    def pass_over(self, step: int) -> None:
        """A step without a usable value (NaN): it is no gap in the log."""
        if self.last_step is not None and step > self.last_step:
            self.last_step = step

    def finish(self) -> list[Change]:
        """The log ends here: give the verdict on what is still open."""
        return self._cut_short()

    def _learn_interval(self, gone: int) -> None:
        """The usual interval between values: a mean over about 16, or a new gap once it has been seen
        twice."""
        if not self.interval or gone == self.odd_gap:
            self.interval = float(gone)
        else:
            self.interval += (min(gone, GAP_INTERVALS * self.interval) - self.interval) / 16
        self.odd_gap = gone

    # ------------------------------------------------------------------------------------------------- quiet

    def _judge(self, step: int, value: float) -> list[Change]:
        base = self.baseline
        if base.count == 0:
            base.start(value)
            return self._ordinary(step)
        residual = value - base.level
        if residual > base.limit():
            return [self._begin(step, value)]
        if base.jumped(value):
            base.drop_to_recent()
            return [self._begin(step, value)]
        if self.fresh:
            base.start(value)
            return self._ordinary(step)
        if residual > base.band():
            self.doubtful.append((step, value))
            return [self._begin_at_doubt()] if len(self.doubtful) == DOUBTFUL_RUN else []
        base.accept(value)
        return self._ordinary(step)

    def _ordinary(self, step: int) -> list[Change]:
        self.fresh = False
        self.inside = step
        if self.doubtful:
            self.baseline.exceeded(len(self.doubtful))
            self.doubtful.clear()
        self.since_block += 1
        return self.end_block(step) if self.since_block == BLOCK_VALUES else []

    def end_block(self, step: int) -> list[Change]:
        """Every 16 ordinary values: look at the creep, and keep the baseline for a run that comes back to
        this step."""
        self.since_block = 0
        self.baseline.settle()
        self.snapshots.append((step, self.baseline.state()))
        if len(self.snapshots) > SNAPSHOTS:
            # Every other one of the older three quarters goes: what is kept reaches back twice as far each
            # time.
            old = len(self.snapshots) * 3 // 4
            self.snapshots[:old] = self.snapshots[:old:2]
        return self._watch_creep(step) if self.creep else []

    def _begin(self, step: int, value: float) -> Change:
        onset = self.doubtful[0][0] if self.doubtful else step
        inside = self.inside if self.inside is not None else onset
        height = value - self.baseline.level
        self.open = Open(
            kind="hard-batch" if step - inside <= HARD_STEPS else "spike",
            onset=onset,
            inside=inside,
            level=self.baseline.level,
            peak=step,
            height=height,
            end=step,
            out=1 + len(self.doubtful),
            age=1 + len(self.doubtful),
            mean=height,
            mean_peak=height,
        )
        self.doubtful.clear()
        self.baseline.forget_neighbours()
        if self.open.out > HARD_STEPS:
            self.open.kind = "spike"
        return Change("onset", self.open)

    def _begin_at_doubt(self) -> Change:
        peak, value = max(self.doubtful, key=lambda pair: pair[1])
        step, last = self.doubtful.pop()
        change = self._begin(step, last)
        excursion = change.excursion
        excursion.peak, excursion.height = peak, value - excursion.level
        return change

    def _watch_creep(self, step: int) -> list[Change]:
        base = self.baseline
        crept = base.creep()
        if crept < 0.5:
            self.creep_onset = None
            return []
        if self.creep_onset is None:
            self.creep_onset = step
        if crept < 1.0:
            return []
        onset = self.creep_onset
        height, limit = base.slow - base.lowest, base.creep_limit()
        base.level = base.slow = base.lowest
        base.forget_neighbours()
        self.creep_onset = None
        self.open = Open(
            kind="divergence",
            onset=onset,
            inside=onset,
            level=base.level,
            peak=step,
            height=height,
            end=step,
            out=HARD_STEPS + 1,
            long_run=True,
            mean=height,
            mean_peak=height,
            crept_until=limit / 2,
        )
        return [Change("onset", self.open)]

    # ------------------------------------------------------------------------------------------------- out

    def _follow(self, now: Open, step: int, value: float) -> list[Change]:
        residual = value - now.level
        now.age += 1
        now.mean += MEAN_GAIN * (residual - now.mean)
        now.mean_peak = max(now.mean_peak, now.mean)
        if now.crept_until is None:
            out = residual > self.baseline.band()
        else:
            out = now.mean > now.crept_until
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
        if now.calm == SETTLE_VALUES:
            return [self._close("spike" if now.long_run or now.out > HARD_STEPS else "hard-batch")]
        if now.kind == "hard-batch" and (now.long_run or now.out > HARD_STEPS):
            now.kind = "spike"
            return [Change("change", now)]
        if now.age >= FIRST_CHECK and now.age & (now.age - 1) == 0:
            return self._check(now, value)
        return []

    def _check(self, now: Open, value: float) -> list[Change]:
        """At ages 64, 128, 256, ...: is it coming back?"""
        before, now.mean_at_check = now.mean_at_check, now.mean
        if now.age == FIRST_CHECK:
            return []
        stays = now.mean >= 0.5 * now.mean_peak
        if abs(now.mean - before) <= 0.1 * before:
            change = self._close("divergence" if stays else "spike")
            self.inside = self.last_step
            return [change]
        if stays and now.kind != "divergence":
            now.kind = "divergence"
            return [Change("change", now)]
        return []

    def _close(self, kind: str) -> Change:
        assert self.open is not None
        closed, self.open = self.open, None
        closed.kind = kind
        if kind == "hard-batch":
            self.baseline.exceeded(closed.out)
        if closed.age >= FIRST_CHECK:  # what was learned before it is old: begin where the signal is now
            self.baseline.start(closed.level + closed.mean)
        self.inside = closed.inside
        self.doubtful.clear()
        return Change("end", closed)

    def _cut_short(self) -> list[Change]:
        now = self.open
        if now is None:
            return []
        kind = now.kind
        if now.out > HARD_STEPS and now.mean >= 0.5 * now.mean_peak:
            kind = "divergence"
        elif kind == "hard-batch":
            kind = "spike"
        return [self._close(kind)]

    # -------------------------------------------------------------------------------------------------
    # history

    def _begin_stretch(self) -> None:
        self.fresh = True
        self.doubtful.clear()
        self.creep_onset = None
        self.baseline.forget_neighbours()

    def _restart(self, step: int) -> None:
        """The run goes on from an earlier step: so does the baseline."""
        while self.snapshots and self.snapshots[-1][0] >= step:
            self.snapshots.pop()
        if self.snapshots:
            self.baseline.restore(self.snapshots[-1][1])
            self.inside = step - max(1, round(self.interval))  # a state that is taken up again was in order
        else:
            base = self.baseline
            self.baseline = Baseline(base.relative_floor, base.absolute_floor, base.prior)
            self.inside = None
        self.since_block = 0
        self._begin_stretch()

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        return {
            "baseline": list(self.baseline.state()),
            "last_step": self.last_step,
            "interval": self.interval,
            "odd_gap": self.odd_gap,
            "fresh": self.fresh,
            "inside": self.inside,
            "doubtful": [list(pair) for pair in self.doubtful],
            "creep_onset": self.creep_onset,
            "open": None if self.open is None else asdict(self.open),
            "snapshots": [[step, list(state)] for step, state in self.snapshots],
            "since_block": self.since_block,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline.restore(state["baseline"])
        self.last_step = state["last_step"]
        self.interval = state["interval"]
        self.odd_gap = state["odd_gap"]
        self.fresh = state["fresh"]
        self.inside = state["inside"]
        self.doubtful = [(step, value) for step, value in state["doubtful"]]
        self.creep_onset = state["creep_onset"]
        self.open = None if state["open"] is None else Open(**state["open"])
        self.snapshots = [(step, tuple(values)) for step, values in state["snapshots"]]
        self.since_block = state["since_block"]

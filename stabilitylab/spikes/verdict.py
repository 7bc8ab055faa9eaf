"""An open excursion, and the verdict on it.

- *hard-batch* while at most two values were out and each of them was followed, within the two steps that a hard batch may last, by
  an ordinary one. In a log of every fifth step a single value out may have lasted nine steps: that is a *spike*, where the noise is
  known to throw no single values out. In a smoothed log (an exponential mean of factor a, ``smoothing.py``) it decays by a per
  value instead, and a is the correlation of neighbours. One such decay in correlated noise may also be a spike; after
  ``SMOOTHED_SEEN`` of them, one that decays so, within the noise of single steps, stays a hard batch.
- *divergence* once, 128 values in, the latest residuals (their median) are still at least half of what the first 64 were: the
  peak's height does not matter. It stays open while it moves or is wilder than the run was before; one that comes back within 512
  values was a spike after all.
- cut short by the log's end or the run going back: a divergence if three or more values were out and the last quarter stands at
  half of the highest third (of fewer than nine values, of them all), else a spike; one or two values less than half the level high
  count as a hard batch, which they nearly always are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from stabilitylab.spikes.baseline import Baseline, median

HARD_STEPS = 2
FIRST_CHECK = (
    64  # ages at which the detector checks an open excursion: 64, 128, 256, ...; verdicts from the second on
)
KEEPS_DIVERGENCE = 512
KEPT_VALUES = 64
END_SHARE = 0.5
LEAST_SMOOTHED = 0.5
SMOOTHED_UNSURE = 0.35
SMOOTHED_SEEN = 2


@dataclass(slots=True)
class Open:
    """An open excursion."""

    kind: str
    onset: int
    inside: int  # the last ordinary step before the present run of values out
    level: float
    peak: int
    height: float
    end: int  # the last step out
    told: int  # the step at which the detector first told its kind
    out: int = 1  # values out so far
    low: int = 0  # values equally far below the level, soon after one above
    since_high: int = 0  # values since the last one above
    long_run: bool = False  # some run of values out lasted longer than a hard batch
    calm: int = 0  # ordinary values in a row
    age: int = 1  # values since onset
    is_out: bool = True
    run: int = 1  # values out in the present run
    residuals: list[float] = field(default_factory=list)  # the latest 64
    first: float = 0.0  # median of the first 64
    at_check: float = 0.0
    stayed: int = 0  # the greatest age at which it had not come back by half
    # The height at which a crept-up mean is back; its mean is followed, as its single values may well be ordinary. None for
    # excursions that began with values out.
    crept_until: float | None = None
    smoothed: bool = False  # so far it has decayed as one value does in a smoothed log

    def count(self, step: int, residual: float, *, out: bool, even: bool) -> None:
        """Count one more value; ``even``: see ``lasted``."""
        if out:
            if residual > self.height:
                self.peak, self.height = step, residual
            self.is_out, self.calm, self.end = True, 0, step
            self.out += 1
            self.run += 1
            if lasted(step, self.inside, self.run, even=even) > HARD_STEPS:
                self.long_run = True
            return
        if self.is_out and lasted(step, self.inside, self.run, even=even) > HARD_STEPS + 1:
            self.long_run = True
        self.is_out, self.inside, self.run = False, step, 0
        self.calm += 1


@dataclass(frozen=True, slots=True)
class Transition:
    """What an update did: ``phase`` "onset", "change" or "end" of an excursion, as it stands then."""

    phase: str
    excursion: Open


def lasted(step: int, inside: int, values: int, *, even: bool) -> int:
    """For how many steps the loss may have been out since ``inside``.

    In a log of every fifth step, for all steps between, if the noise is ``even``; else for as many as there were values out, since
    noise that throws single values out does so in a sparse log, too.
    """
    return step - inside if even else min(step - inside, values)


def verdict_at_end(now: Open) -> str:
    """The kind of an excursion that nothing follows."""
    if now.crept_until is not None:
        return "divergence"
    if now.out > HARD_STEPS:
        kept = now.residuals
        last = median(kept[-max(1, len(kept) // 4) :])
        third = len(kept) // 3
        highest = (
            max(median(part) for part in (kept[:third], kept[third:-third], kept[-third:]))
            if third > 2
            else median(kept)
        )
        return "divergence" if last >= END_SHARE * highest else "spike"
    if now.kind == "hard-batch" and now.height < END_SHARE * abs(now.level):
        return "hard-batch"
    return "spike"


@dataclass(slots=True)
class Smoothing:
    """What the excursions so far say about whether the log is an exponential mean."""

    factor: float = 0.0  # their decay per value; 0 before the first
    seen: int = 0  # number of those that decay so, less two for each that does not

    @property
    def known(self) -> bool:
        return self.seen >= SMOOTHED_SEEN

    def explains(self, residuals: Sequence[float], baseline: Baseline) -> bool:
        """Whether the values out are the trace of one or two wild values in an exponential mean.

        Until decays have shown the factor a, it is the correlation of neighbours, from the ratio q of the deviation from second
        differences to that about the level: for an AR(1), q^2 = (1 - a)(3 - a)/3, so a = 2 - sqrt(1 + 3 q^2). Then u_k = r_k - a
        r_{k-1} is what each step adds; beyond the peak it must be the noise of steps, sqrt(1 - a^2) of the deviation, but for the
        uncertainty of a.
        """
        scale = baseline.scale1
        if not baseline.known or not scale > 0.0 or len(residuals) < 3:
            return False
        correlation = 2 - math.sqrt(1 + 3 * min(1.0, (baseline.ripple / scale) ** 2))
        top = max(range(len(residuals)), key=residuals.__getitem__)
        if correlation < LEAST_SMOOTHED or top >= HARD_STEPS:
            return False
        factor = self.factor if self.known else correlation
        noise, unsure = scale * math.sqrt(1 - factor * factor), SMOOTHED_UNSURE * (1 - factor)
        added = before = 0.0
        for count, (last, r) in enumerate(pairwise(residuals[top:]), start=1):
            added += r - factor * last
            before += abs(last)
            if abs(r - factor * last) > 5 * noise + unsure * abs(last):
                return False
            if abs(added) > 3 * noise * math.sqrt(count) + unsure * before:
                return False
        return True

    def learn(self, residuals: Sequence[float], baseline: Baseline) -> None:
        """Learn from an excursion that is over and was longer than a hard batch."""
        if not self.explains(residuals, baseline):
            self.seen = max(0, self.seen - 2)
            return
        top = max(range(len(residuals)), key=residuals.__getitem__)
        pairs = list(pairwise(residuals[top:]))
        factor = sum(a * b for a, b in pairs) / sum(a * a for a, _ in pairs)
        self.seen = min(self.seen + 1, 4 * SMOOTHED_SEEN)
        self.factor += (min(max(factor, 0.0), 0.995) - self.factor) / self.seen


def is_noise(now: Open, baseline: Baseline) -> bool:
    """Whether values went as far and as often to the other side, so that the noise has grown rather than the state has left."""
    return now.low >= max(1, 0.3 * now.out) and now.height < 3 * baseline.limit()

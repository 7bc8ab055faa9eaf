"""Values that carry no information: NaN and infinity, a dead loss, a frozen loss.

*Non-finite* values that return within 32 finite ones are one burst (one rank in four, every second value). A value at the end of
float32's or float64's range counts as infinite: stores that cannot hold infinity write that instead.

A loss is *dead* if it is exactly 0 three times in a row, far below its level: HuggingFace's NaN filter and unset buffers write
zeros; no run learns everything within one step. It is *frozen* if it repeats one value so often that chance does not explain it.
Where neighbours are equal with probability p (values printed with few decimals), a run of n equal ones has probability p^n: it is
frozen below 1e-12, from 16 values on, and beyond four times the longest run before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stabilitylab.telemetry import Event

HOLE = 32
DEAD_VALUES = 3
FROZEN_VALUES = 16
RARITY = 12.0  # decades
REPEAT_GAIN = 1 / 128
LARGEST = 3.4028234e38  # float32's


def is_finite(value: float) -> bool:
    """Whether ``value`` is a measurement: finite and not at the end of float32's or float64's range."""
    return -LARGEST < value < LARGEST


@dataclass(slots=True)
class Burst:
    """Non-finite values, at most 32 finite ones apart."""

    episode: int
    onset: int
    end: int
    seen: str
    told: int
    finite: int = 0  # finite values since the last non-finite one


def burst_event(step: int, name: str, burst: Burst, phase: str, *, over: bool = True) -> Event:
    """The event about a burst of the signal ``name`` at ``step``; ``over``: its end has been seen."""
    data = {
        "episode": burst.episode,
        "phase": phase,
        "signal": name,
        "onset": burst.onset,
        "peak": burst.onset,
        "end": burst.end if phase == "end" else None,
        "height": None,
        "value": burst.seen,
        "told": burst.told,
        "to_the_end": phase == "end" and not over,
    }
    return Event(step=step, kind="non-finite", data=data)


@dataclass(slots=True)
class Stillness:
    """Counts equal values of one signal. O(1) memory."""

    previous: float = math.nan
    equal: int = 1  # values in the present run of equal ones
    since: int = 0  # the step at which it began
    repeats: float = 0.0  # share of values that equal the one before, as of the start of this run
    longest: int = 1  # run of equal values before this one
    values: int = 0

    def update(self, step: int, value: float, level: float, band: float, *, fine: bool = True) -> str | None:
        """Returns "dead" or "frozen" while the signal is so; the loss's level and band say what zero means.

        Args:
            step: the value's step.
            value: a finite value.
            level: the baseline's level; NaN before it is known.
            band: residual up to which a value is ordinary; NaN before it is known.
            fine: whether values are printed finely enough to show their noise; else a repeat says nothing.
        """
        self.values += 1
        if value != self.previous:
            self._end_run()
            self.previous, self.since = value, step
            return None
        self.equal += 1
        if value == 0.0 and self.equal >= DEAD_VALUES and level > band:
            return "dead"
        if not fine or self.equal < FROZEN_VALUES or not band > 0.0 or self.equal == self.values:
            return None
        rarity = -math.log10(min(max(self.repeats, 1e-3), 0.999))
        return "frozen" if self.equal > 4 * self.longest and self.equal * rarity > RARITY else None

    def _end_run(self) -> None:
        """The share of repeats forgets in 128 values: a run of n holds n - 1 repeats and one change."""
        n = self.equal
        if self.values > 1:
            kept = (1 - max(REPEAT_GAIN, 1 / self.values)) ** n
            self.repeats = kept * self.repeats + (1 - kept) * (n - 1) / n
            self.longest = max(self.longest, n)
        self.equal = 1

    def skip(self, steps: Sequence[int], values: Sequence[float], *, distinct: bool) -> None:
        """Take in values of which no three in a row are equal, so that ``update`` would have said nothing.

        ``distinct``: no two neighbours are equal, the last value before them included.
        """
        if distinct and self.repeats == 0.0 and self.equal == 1 and self.values:
            self.values += len(values)
            self.previous, self.since = values[-1], steps[-1]
            return
        for step, value in zip(steps, values, strict=True):
            self.values += 1
            if value != self.previous:
                self._end_run()
                self.previous, self.since = value, step
            else:
                self.equal += 1

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self), "previous": None if math.isnan(self.previous) else self.previous}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Stillness:
        return cls(**{**state, "previous": math.nan if state["previous"] is None else state["previous"]})

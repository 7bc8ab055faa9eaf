"""Distinguishes the collapse of a dynamic loss scale from its routine.

The scaler halves a dynamic scale at an overflow and doubles it after a window without one. Routine is a search from the start value
down to one that fits, and later an occasional halving that a doubling reverses. Four halvings of an established scale without a
doubling between them are not routine: no window passed. GLM-130B's scale fell so some 30 steps before the loss broke away
(2210.02414, section 3.3), OPT-175B's ran to zero with its divergences (2205.01068, section 2.5).

A scale is *established* when it grew to its value (it passed a window), or held for 16 values at the start. After a restart or a
gap of more than 16 usual intervals in which it did not grow, the watch starts afresh.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

COLLAPSE = 16.0
HOLD_VALUES = 16
GAP_INTERVALS = 16


@dataclass(slots=True)
class ScaleWatch:
    """Follows one loss scale. O(1) memory.

    Args:
        collapse: the factor by which the scale must have fallen.
    """

    collapse: float = COLLAPSE
    last_step: int | None = None
    interval: float = 0.0
    scale: float = 0.0
    held: int = 0
    established: float | None = None
    falling_since: int | None = None
    collapsed: bool = False
    # About the latest collapse:
    onset: int = 0
    reference: float = 0.0
    lowest: float = 0.0
    lowest_step: int = 0

    def update(self, step: int, scale: float) -> str | None:
        """Returns "onset" when the scale has collapsed, "end" when it grows again after that."""
        if self.last_step is None:
            self._begin(step, scale)
            return None
        gone = step - self.last_step
        if gone == 0:
            return None
        if gone < 0 or (self.interval and gone > GAP_INTERVALS * self.interval):
            ended, grew = self.collapsed, gone > 0 and scale > self.scale
            self._begin(step, scale)
            self.established = scale if grew else None
            return "end" if ended else None
        self.interval += (gone - self.interval) / 16 if self.interval else gone
        self.last_step = step
        before, self.scale = self.scale, scale
        if scale > before:
            ended, self.collapsed = self.collapsed, False
            self.established, self.falling_since, self.held = scale, None, 0
            return "end" if ended else None
        if scale == before:
            self.held += 1
            if self.established is None and self.held >= HOLD_VALUES:
                self.established = scale
            return None
        self.held = 0
        if self.established is None:
            return None
        if self.falling_since is None:
            self.falling_since = step
        if self.collapsed or scale * self.collapse <= self.established:
            self.lowest, self.lowest_step = scale, step
        if not self.collapsed and scale * self.collapse <= self.established:
            self.collapsed = True
            self.onset, self.reference = self.falling_since, self.established
            return "onset"
        return None

    @property
    def height(self) -> float:
        """How far the latest collapse went, in halvings."""
        return math.log2(self.reference / self.lowest)

    def _begin(self, step: int, scale: float) -> None:
        self.last_step, self.scale, self.held = step, scale, 0
        self.established, self.falling_since, self.collapsed = None, None, False

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

"""The questions that every law of comparison answers: effect, interval, evidence against "no difference", and power."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class InterimLook:
    """One look at the data. Effects are arm minus baseline, in the unit of the law's values.

    Attributes:
        effect: the point estimate; NaN where the data have none.
        low, high: the interval; infinite where the data do not bound it.
        sign: +1 or -1 where the look rejects "no difference" in that direction, else 0.
        log_e: natural logarithm of the e-value against "no difference".
    """

    effect: float
    low: float
    high: float
    sign: int
    log_e: float


class Law(Protocol):
    """One way to compare two arms."""

    @property
    def name(self) -> str:
        """Name for the reader of a verdict."""

    def bet(self) -> tuple[float, int]:
        """Natural logarithm of the e-value against "no difference", and the side on which the arm lies: +1, -1 or 0."""

    def look(self, alpha: float, *, sequential: bool) -> InterimLook:
        """The evidence at level ``alpha``; ``sequential``: valid at every look, else at this one alone."""

    def detectable(self, alpha: float, *, sequential: bool) -> float:
        """The true effect that these many runs, with their spread, would have decided with a power of 80 %; infinite: none."""

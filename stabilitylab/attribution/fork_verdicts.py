"""Did the event come? Compares a fork's curve with the control's.

The control gives a *yardstick* of the signal y (a loss in nats; the logarithm of a gradient norm, minus log2 of a loss scale):

    base     median of the last 16 values before the onset                noise    1.4826 MAD of their differences / sqrt 2
    height   max(y) - base from the onset on                              area     sum of max(y - base - 2 noise, 0)

A fork ``prevents`` the event where height and area are at most a quarter of the control's, or its height is within 4 noise of the
base; it ``halves`` it where both are at most a half; else it does ``nothing``. All of the fork's steps count, so an event that
comes earlier is not prevented. Where the control is not finite, a fork that stays finite prevents the event if it rises by less
than a tenth of the base, else halves it.

A fork is decided, and ends, as soon as its height exceeds half of the control's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The kind of event in which a run keeps the forks' proof.
EVENT = "attribution"
PREVENTS, HALVES, NOTHING, FAILED = "prevents", "halves", "nothing", "failed"
PAST, WATCHED = 16, 24
_PREVENTED, _HALVED, _OF_NOISE, _OF_BASE = 0.25, 0.5, 4.0, 0.1


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """The control, measured; see the module's docstring. ``end`` is the step at which forks end."""

    begin: int
    onset: int
    end: int
    base: float
    noise: float
    height: float
    area: float

    @property
    def shows(self) -> bool:
        """Whether the control rose at all."""
        return self.height > _OF_NOISE * self.noise


@dataclass(frozen=True, kw_only=True)
class ForkVerdict:
    """What a fork did to the event.

    Attributes:
        word: prevents, halves, nothing, or failed (did not train).
        height, area: shares of the control's; NaN where neither is finite.
    """

    word: str
    height: float
    area: float

    @property
    def prevents(self) -> bool:
        return self.word == PREVENTS

    @property
    def comes(self) -> bool:
        """Neither prevented nor halved."""
        return self.word == NOTHING


def yardstick(values: Sequence[float], begin: int, onset: int, past: Sequence[float] = ()) -> Yardstick:
    """Measure the control.

    Args:
        values: the signal from step ``begin`` on.
        onset: the step at which the event begins.
        past: values before ``begin``, where known.
    """
    before = [v for v in [*past, *values[: onset - begin]] if math.isfinite(v)][-PAST:]
    if not before:
        before = [values[0]]
    base = float(np.median(before))
    noise = 1e-3 * abs(base)
    if len(before) > 2:
        differences = np.diff(before)
        spread = float(np.median(np.abs(differences - np.median(differences))))
        noise = max(noise, 1.4826 * spread / math.sqrt(2))
    after = np.asarray(values[onset - begin :], dtype=np.float64)
    height, area = _rise(after, base, noise)
    end = begin + len(values)
    if math.isfinite(height) and len(after):
        peak = int(np.argmax(after))
        back = np.flatnonzero(after[peak:] - base <= 0.1 * height)
        if len(back):
            end = min(end, onset + peak + int(back[0]) + 3)
            _, area = _rise(after[: end - onset], base, noise)
    else:
        lost = np.flatnonzero(~np.isfinite(after))
        if len(lost):
            end = min(end, onset + int(lost[0]) + 4)
            _, area = _rise(after[: end - onset], base, noise)
    return Yardstick(begin=begin, onset=onset, end=end, base=base, noise=noise, height=height, area=area)


def verdict(of: Yardstick, values: Sequence[float]) -> ForkVerdict:
    """Judge a fork's signal from step ``of.begin`` on."""
    y = np.asarray(values, dtype=np.float64)
    height, area = _rise(y, of.base, of.noise)
    if not math.isfinite(of.height):
        if not math.isfinite(height):
            return ForkVerdict(word=NOTHING, height=math.nan, area=_share(area, of.area))
        small = height <= max(_OF_NOISE * of.noise, _OF_BASE * abs(of.base))
        return ForkVerdict(
            word=PREVENTS if small else HALVES, height=0.0 if small else math.nan, area=_share(area, of.area)
        )
    tall, wide = _share(height, of.height), _share(area, of.area)
    if height <= _OF_NOISE * of.noise or (tall <= _PREVENTED and wide <= _PREVENTED):
        word = PREVENTS
    elif tall <= _HALVED and wide <= _HALVED:
        word = HALVES
    else:
        word = NOTHING
    return ForkVerdict(word=word, height=tall, area=wide)


def is_decided(of: Yardstick, values: Sequence[float]) -> bool:
    """Whether the last of ``values`` settles that the event came."""
    rise = values[-1] - of.base
    if not math.isfinite(of.height):
        return not math.isfinite(rise)
    return not rise <= max(_HALVED * of.height, _OF_NOISE * of.noise)


def _rise(y: np.ndarray[tuple[int], np.dtype[np.float64]], base: float, noise: float) -> tuple[float, float]:
    if not len(y):
        return 0.0, 0.0
    finite = np.isfinite(y)
    over = np.maximum(np.where(finite, y, 0.0) - base - 2 * noise, 0.0)
    # A value that is not finite counts as the whole level in the area, and as infinite height.
    area = float(np.sum(np.where(finite, over, abs(base))))
    return (float(np.max(y)) - base if finite.all() else math.inf), area


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else (0.0 if part <= 0 else math.inf)

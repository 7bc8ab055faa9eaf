"""Predicts a signal's next value, and how large a deviation is too large: a baseline that learns before it judges.

The baseline learns from ordinary values in blocks of 16, x_1 ... x_16. A block moves

    level     m <- median of the block                                   seven wild values in sixteen do not move it
    scales    of the residual of single values, r = x - m, and of means of 4 and of 16 of them, each

                  s <- s exp(g (A - 1)),   A = mean of min(z, 2)^2 over z = max(r, 0) / s, times 2 / .92

              an M-estimate (Huber 1964) by stochastic approximation: A = 1 where s is a Gaussian's deviation
    ripple    the same of second differences c |x_t - 2 x_{t-1} + x_{t-2}|, c = 1/sqrt(6)
    creep     a slow mean of levels, and its lowest so far: a loss has left at 8 deviations and 15 % over that, or at twice
              that level with 5.5 deviations (the slow mean of an AR(1) of .9 ranges over some 4.3 in 20,000 values)

A residual is taken from the level of the block *before*, as when the detector judges a value. So a scale belongs to the very
statistic that it judges: where neighbours are correlated (an AR(1) of .9, an averaged log) the mean of four scatters as much as one
value, and its scale says so. Counting the upper half only, and from the line of the fall where the block lies lower, keeps a
falling trend out. The baseline learns the first two blocks as a whole (the second one's deviation about a straight line). A value
before that is judged only if it is half as high again (before the eighth three times as high, or twice and 30 deviations off) as
any of the last three and 10 deviations off. The first blocks' scales shrink fast: they come from the steepest fall.

A single value is

    r <= band  = max(3 k s1, 2/3 floor)      ordinary
    r >  limit = max(7 k^2 s1, floor)        out: an excursion begins

and an excursion begins too where the mean of four residuals, each clipped at the limit of ordinary, exceeds 7 s4, or that of a
block 7 s16. Seven deviations are the rarity that OLMo 2's spike score uses (2501.00656, section 3.1). The tail factor k is 1 in
Gaussian noise; where more than one value in a hundred lies over the band, each multiplies k by 1.1 (a quantile by stochastic
approximation, Robbins and Monro 1951), and a tail that is heavy at 3 s remains heavy beyond, hence k^2: a single value tells
little there, means of four still do. A tail counts only where it belongs to the noise: where noise reaches as far down (the same
quantile below the block's middle), or leans up, its shoulders (1.5 to 3 s) fuller above than below by half or more. Even noise with
high values out is even noise with spikes.

``floor`` is the smallest rise worth reporting, whatever the noise: 3 % of the level of a loss for a single value, .6 of it for
means; a factor of 2 of a norm. It vanishes with the level, so a loss around zero is judged by its noise alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from operator import attrgetter
from typing import Any

BLOCK = 16
GROUP = 4
LEARNED_FROM = 2 * BLOCK
BAND_SIGMAS = 3.0
LIMIT_SIGMAS = 7.0
BAND_SHARE = 2 / 3
MEAN_SHARE = 0.6
# Scales are accurate to some 20 % after two blocks, to 8 % later: the limit is wider at first.
UNSURE = 0.5
# Second differences under .6 of the deviation: neighbours are correlated by more than .6.
UNSURE_CORRELATED = 2.0
CORRELATED = 0.7
FEW_VALUES = 3
FEW_SHARE = 0.5
FEW_SIGMAS = 10.0
LEAST = 1e-150  # its square is a number
CLIP = 2.0
CLIPPED_SQUARE = 0.9205  # E min(z, 2)^2 of a Gaussian: P(|z| < 2) - 4 phi(2) + 4 P(|z| > 2)
# How fast a block moves the scales: s1 has 16 residuals in it, s4 four means, s16 one.
GAINS = (1 / 16, 1 / 20, 1 / 24)
EARLY_BLOCKS = 7
FORGET_WHITE, FORGET_CORRELATED = 0.8, 0.45
TAIL_STEP = 1.1
TAIL_DECAY = TAIL_STEP ** (-BLOCK / 100)
MOST_TAIL = 4.0
SHOULDER = 1.5
SHAPE_GAIN = 1 / 64
SHAPE_KNOWN = 16
DEEPEST = 4.5
FORGET_DEPTH = 0.995
EVEN = 2.0
FALL_SIGMAS = 2.0
CREEP_GAIN = 1 / 2
CREEP_SIGMAS = 8.0
CREEP_SHARE = 0.15
DOUBLED_SIGMAS = 5.5
RIPPLE = 1 / math.sqrt(6)
MAD = 1.4826
RANGE_OF_THREE = 1.7


@dataclass(slots=True)
class Baseline:
    """The state above for one signal.

    Args:
        relative_floor: floor as a share of |level|.
        absolute_floor: floor in the signal's own unit; the larger of the two counts.
    """

    relative_floor: float
    absolute_floor: float
    blocks: int = 0  # blocks learned from, over all stretches
    level: float = 0.0
    scale1: float = 0.0
    scale4: float = 0.0
    scale16: float = 0.0
    ripple: float = 0.0
    tail: float = 1.0
    lower_tail: float = 1.0
    upper: float = 0.0  # shares of values 1.5 to 3 deviations above, and below, their block's own middle
    lower: float = 0.0
    deepest: float = 0.0  # the furthest below that lately, in deviations
    slow: float = 0.0
    lowest: float = 0.0
    quantum: float = 0.0  # values are printed in steps of this, as far as can be seen

    @property
    def known(self) -> bool:
        """Whether the baseline has learned the noise."""
        return self.blocks > 0

    @property
    def sigma(self) -> float:
        """Deviation of a single value about the level."""
        return max(self.scale1, self.ripple, self.quantum)

    @property
    def floor(self) -> float:
        return max(self.relative_floor * abs(self.level), self.absolute_floor)

    def unsure(self) -> float:
        """How much wider the limits are while the scales are young; the more so where few values are independent."""
        if not self.blocks:
            return math.inf
        correlated = self.ripple < CORRELATED * self.scale1
        return 1.0 + (UNSURE_CORRELATED if correlated else UNSURE) / self.blocks

    @property
    def even(self) -> bool:
        """Whether the noise is known to reach down no further than a Gaussian's, and not to be skewed upwards."""
        if self.blocks < SHAPE_KNOWN:
            return False
        return self.deepest < DEEPEST and self.upper < EVEN * max(self.lower, 1e-3)

    @property
    def factor(self) -> float:
        """How much further than a Gaussian's the noise reaches up, by its tail, if the tail is the noise's own."""
        if self.tail <= self.lower_tail:
            return self.tail
        skewed = (self.upper / max(self.lower, 1e-3) - 1.5) if self.blocks >= SHAPE_KNOWN else 1.0
        return self.lower_tail + (self.tail - self.lower_tail) * min(1.0, max(0.0, skewed))

    def band(self) -> float:
        """Residuals up to here are ordinary."""
        return max(BAND_SIGMAS * self.sigma * self.factor, BAND_SHARE * self.floor)

    def odd(self) -> float:
        """The tail factor learns from residuals above this, one in a hundred."""
        return max(BAND_SIGMAS * self.sigma * self.tail, BAND_SHARE * self.floor)

    def limit(self) -> float:
        """Single residuals above this begin an excursion."""
        return max(LIMIT_SIGMAS * self.sigma * (self.factor * self.factor) * self.unsure(), self.floor)

    def limit_of_four(self) -> float:
        # A block or two say little about the correlation of neighbours: their means may scatter as much as one value.
        scale = max(self.scale4, self.sigma * (0.5 + 0.5 / max(1, self.blocks)))
        return max(LIMIT_SIGMAS * scale * self.factor * self.unsure(), MEAN_SHARE * self.floor)

    def limit_of_block(self) -> float:
        scale = max(self.scale16, 0.7 * self.scale4, self.sigma / 4)
        return max(LIMIT_SIGMAS * scale * self.unsure(), MEAN_SHARE * self.floor)

    def creep(self) -> float:
        """How far the slow mean stands above its lowest value, as a share of what would be an excursion."""
        return (self.slow - self.lowest) / self.creep_limit() if self.slow > self.lowest else 0.0

    def creep_limit(self) -> float:
        share = CREEP_SHARE * abs(self.lowest) if self.relative_floor else 0.0
        limit = max(CREEP_SIGMAS * self.sigma, share, self.absolute_floor, 1e-300)
        # The noise of a climbing loss grows with it. Twice the lowest level, where that is below the level, is no noise.
        if self.relative_floor and self.lowest > self.sigma:
            limit = min(limit, max(DOUBLED_SIGMAS * self.sigma, self.lowest))
        return limit

    # ---------------------------------------------------------------------------------------------- learning

    def suppose(self, values: Sequence[float]) -> float:
        """Estimate level and noise from the few values so far; returns the rise that would be out at any noise."""
        last = values[-BLOCK // 2 :]
        self.level = median(last)
        share = FEW_SHARE if len(values) >= BLOCK // 2 else 2 * FEW_SHARE
        least = share * abs(self.level) / FEW_SIGMAS if self.relative_floor else self.absolute_floor
        own = max(_deviation_about_line(last), ripple_of(values))
        # Three values differ by 1.7 deviations; by how much they fall says nothing.
        risen = _largest_rise(values) / RANGE_OF_THREE if len(values) < BLOCK // 2 else 0.0
        self.scale1 = max(own, risen, 0.25 * least)
        if len(values) >= BLOCK // 2 or not self.relative_floor:
            return FEW_SIGMAS * max(self.scale1, least)
        # Four values of batches of 4 lie close together by chance, but not within a thirtieth of what follows.
        return FEW_SIGMAS * min(max(3 * own, risen, least), max(self.scale1, 2 * least))

    def learn_first(self, values: Sequence[float]) -> None:
        """Learn everything from the first values of a stretch."""
        self.level = self.slow = self.lowest = median(values[-BLOCK:])
        # The first half of a run's first values is its steepest fall, and no noise.
        sigma, ripple = _deviation_about_line(values[-BLOCK:]), ripple_of(values)
        self._see_quantum(values)
        if self.blocks and self.scale1 > 0:  # a new stretch of a run whose noise is known
            sigma = max(sigma, 0.5 * self.scale1)
        self.scale1, self.ripple = sigma, ripple
        # Four times the values halve the noise of a mean, once correlated neighbours are allowed for.
        self.scale4 = max(0.5 * max(sigma, ripple), _deviation_of_means(values[-BLOCK:]))
        self.scale16 = 0.7 * self.scale4
        self.blocks = max(1, self.blocks)

    def learn(self, block: Sequence[float]) -> None:
        """Learn from a block of ordinary values; ``known`` must hold."""
        level, n = self.level, len(block)
        # On a fall the whole block lies below the level: its scatter shows about the line of the fall.
        middle = median(block)
        if middle < level:
            slope = (middle - level) / n
            start = middle - slope * (n - 1) / 2
            residuals = [x - start - slope * i for i, x in enumerate(block)]
        else:
            residuals = [x - level for x in block]
        floor = max(self.quantum, 1e-9 * abs(level), LEAST)
        early = 1 / (self.blocks + EARLY_BLOCKS)
        gain1, gain4, gain16 = (max(gain, early) for gain in GAINS)
        if self.blocks < EARLY_BLOCKS:  # forget fast what the steepest part of the fall taught
            own, ripple = MAD * median([abs(r) for r in residuals]), ripple_of(block)
            share = FORGET_WHITE if ripple > CORRELATED * own else FORGET_CORRELATED
            self.scale1 = _forget(self.scale1, max(own, floor), share)
            self.ripple = _forget(self.ripple, max(ripple, floor), share)
        self.scale1 = _moved(max(self.scale1, floor), residuals, gain1)
        clip = BAND_SIGMAS * self.scale1 * self.tail
        clipped = [r if r < clip else clip for r in residuals]
        fours = [total(clipped[i : i + GROUP]) / GROUP for i in range(0, n - GROUP + 1, GROUP)]
        if self.blocks < EARLY_BLOCKS:
            own = MAD * median([abs(r) for r in fours])
            self.scale4 = _forget(self.scale4, max(own, 0.5 * self.scale1), share)
        self.scale4 = min(_moved(max(self.scale4, 0.25 * floor), fours, gain4), self.scale1)
        self.scale16 = min(_moved(max(self.scale16, 0.1 * floor), [total(clipped) / n], gain16), self.scale4)
        bends = [RIPPLE * abs(a - 2 * b + c) for a, b, c in zip(block, block[1:], block[2:], strict=False)]
        self.ripple = _moved(max(self.ripple, floor), bends, gain1, two_sided=True)
        self.level = middle
        self.tail = max(1.0, self.tail * TAIL_DECAY)
        self._learn_shape(residuals if middle < level else [x - middle for x in block])
        self.blocks += 1
        if self.quantum:
            self._see_quantum(block)
        self.slow += CREEP_GAIN * (self.level - self.slow)
        if self.slow < self.lowest:
            self.lowest = self.slow

    def _learn_shape(self, residuals: Sequence[float]) -> None:
        """Learn the noise's lower side, and how even its shoulders are, from values about their own middle."""
        sigma, reach = self.sigma, BAND_SIGMAS * self.sigma * self.lower_tail
        wide, near = BAND_SIGMAS * sigma, SHOULDER * sigma
        high = low = runs = 0
        before = lowest = 0.0
        for r in residuals:
            if r < 0.0:
                lowest = min(lowest, r)
                low += -wide < r < -near
                runs += r < -reach <= before
            else:
                high += near < r < wide
            before = r
        gain = max(SHAPE_GAIN, 1 / self.blocks)
        self.upper += gain * (high / len(residuals) - self.upper)
        self.lower += gain * (low / len(residuals) - self.lower)
        self.deepest = max(FORGET_DEPTH * self.deepest, -lowest / sigma if sigma > 0.0 else 0.0)
        self.lower_tail = min(MOST_TAIL, max(1.0, self.lower_tail * TAIL_DECAY * TAIL_STEP**runs))

    def exceeded(self, values: int) -> None:
        """Learn the tail from this many values over the band that turned out to be no excursion of the run's state."""
        if values:
            self.tail = min(MOST_TAIL, self.tail * TAIL_STEP**values)

    def shift(self, by: float) -> None:
        """Shift the whole baseline, since the signal's unit has changed."""
        self.level += by
        self.slow += by
        self.lowest += by

    def _see_quantum(self, values: Sequence[float]) -> None:
        """Find the unit of rounding: all neighbours differ by multiples of it, most by at most eight."""
        steps = sorted(abs(a - b) for a, b in pairwise(values) if a != b)
        if not steps:
            return
        least = steps[0]
        rounded = sum(abs(s / least - round(s / least)) < 1e-3 for s in steps) == len(steps)
        self.quantum = least if rounded and steps[len(steps) // 2] <= 8 * least else 0.0

    # ------------------------------------------------------------------------------------------------- state

    def state(self) -> tuple[Any, ...]:
        """Everything that changes, in a fixed order."""
        state: tuple[Any, ...] = _STATE(self)
        return state

    def restore(self, state: Sequence[Any]) -> None:
        for name, value in zip(_CHANGING, state, strict=True):
            setattr(self, name, value)


def _forget(scale: float, own: float, share: float) -> float:
    """The geometric mean with a block's own scale, where that is under a ``share`` that chance, or correlation, does not
    explain."""
    return math.sqrt(scale * own) if own < share * scale else scale


def _moved(scale: float, values: Sequence[float], gain: float, *, two_sided: bool = False) -> float:
    """One step of the M-estimate's stochastic approximation."""
    bound = CLIP * scale
    total = 0.0
    for x in values:
        if x > 0.0:
            total += bound * bound if x > bound else x * x
    if not two_sided:
        total *= 2.0
    return scale * math.exp(gain * (total / (len(values) * scale * scale * CLIPPED_SQUARE) - 1.0))


def total(values: Sequence[float]) -> float:
    """The sum, added in order as in ``series.c``; ``sum`` compensates for rounding from Python 3.12 on."""
    result = 0.0
    for x in values:
        result += x
    return result


def median(values: Sequence[float]) -> float:
    """The middle of at least one value."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


def _deviation_about_line(values: Sequence[float]) -> float:
    """A robust deviation about the line through the medians of both halves: 1.48 times the median residual."""
    n, half = len(values), len(values) // 2
    if n < 4:
        return 0.0
    first, second = median(values[:half]), median(values[half:])
    slope = (second - first) / (n - half)
    middle = 0.5 * (first + second)
    residuals = [x - (middle + slope * (i - (n - 1) / 2)) for i, x in enumerate(values)]
    absolute = sorted(abs(r) for r in residuals)
    return max(MAD * median(absolute), absolute[int(0.8 * n)] / 1.2816)


def _largest_rise(values: Sequence[float]) -> float:
    """The largest rise of any value over an earlier one."""
    lowest, rise = math.inf, 0.0
    for x in values:
        lowest = min(lowest, x)
        rise = max(rise, x - lowest)
    return rise


def _deviation_of_means(values: Sequence[float]) -> float:
    means = [sum(values[i : i + GROUP]) / GROUP for i in range(0, len(values) - GROUP + 1, GROUP)]
    return _deviation_about_line(means)


def ripple_of(values: Iterable[float]) -> float:
    """A robust deviation from second differences."""
    x = list(values)
    bends = [abs(a - 2 * b + c) for a, b, c in zip(x, x[1:], x[2:], strict=False)]
    return MAD * RIPPLE * median(bends) if bends else 0.0


_CHANGING = tuple(field.name for field in fields(Baseline))[2:]
_STATE = attrgetter(*_CHANGING)

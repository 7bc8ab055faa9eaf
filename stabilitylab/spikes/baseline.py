"""What a signal is expected to be next, and how far off is too far: a robust, trend-aware baseline.

Three numbers are kept of the values x_1, x_2, ... that were accepted as ordinary; each costs O(1) memory:

    level     f <- f + (x - f)/8                                exponential mean over about the last 15 values
    sigma     the larger of two estimates of the noise,
              d <- d + (c |x_t - 2 x_{t-1} + x_{t-2}| - d)/64    c = sqrt(pi/2)/sqrt(6): second differences
              u <- u + (sqrt(2 pi) max(x - f, 0) - u)/64         upward residuals
    creep     g <- g + (f - g)/2 once every 16 values, and the   for excursions too slow to be seen
              lowest g so far                                    from one value to the next

Why second differences: a straight trend cancels in them, so a falling loss does not inflate sigma as it
inflates a rolling standard deviation (and with it hides the spikes on the fall). For white noise of deviation
s they have mean absolute value s sqrt(6) sqrt(2/pi), hence c. Why upward residuals too: in a log of averaged
values neighbours are correlated and second differences underestimate; residuals do not, and counting only the
upward ones keeps a fall out of them, where x < f.

A value is judged by its residual r = x - f:

    r <= band  = max(3 k sigma, 2/3 of floor)    ordinary: enters the baseline
    r >  limit = max(7 k sigma, floor)           out: an excursion begins; enters nothing
    between the two                              doubtful: enters nothing; four in a row are an excursion too

On a fall f lags behind; there a value that stands over the limit above both of the last two is out as well.

The spread k is 1 while single values over the band are rare, as in Gaussian noise (1 in 740). Where they
come more often than once in 32 values they are the noise's own tail: each multiplies k by 1.1, and 32 values
without one divide it by 1.1, so k settles where the band holds 97 % of the values (stochastic approximation
of a quantile, Robbins and Monro 1951). Values of a spike do not count: a run full of spikes keeps its k.

``floor`` is the smallest rise that is worth a word whatever the noise: 3 % of the level of a loss, a factor
of 2 of a norm. 7 sigma is the rarity that OLMo 2's spike score uses (2501.00656, section 3.1). A Gaussian
value is doubtful once in 740, four in a row once in 3e11. The estimates of sigma clip what they take at 3 and
6 sigma (2.4 sigma of a second difference or of an upward residual), so that one tail value moves them by at
most 8 %.

Limits: on a steep fall f lags the curve by 7 slopes, which makes the run's first tens of values less sensitive
to what is smaller than a jump. Sigma has a relative error of about 8 % (64 correlated values); the gap between 3 and 7
is there to absorb it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

LEVEL_GAIN = 1 / 8
SIGMA_GAIN = 1 / 64
CREEP_GAIN = 1 / 2
BAND_SIGMAS = 3.0
LIMIT_SIGMAS = 7.0
BAND_SHARE = 2 / 3
FALL_SIGMAS = 2.0
SPREAD_STEP = 1.1
SPREAD_DECAY = SPREAD_STEP**-0.5  # a block of 16 values
# A rise of the slow mean over its own minimum. Its noise is 0.15 sigma, so over 1e6 values (6e4 of g) its
# extremes lie +-0.65 sigma from its centre: 2.5 sigma is out of reach of noise. Twice the floor, since a slow
# wander is no excursion yet.
CREEP_SIGMAS = 2.5
CREEP_FLOORS = 2.0
# Before anything is known the noise is taken as 2.5 % of the first value: fresh runs log their loss to within
# a few per cent.
PRIOR = 0.025
# The noise of the first values weighs like so many; a fresh curve's early noise is forgotten as the run goes on (2/n).
PRIOR_WEIGHT = 8
# Half of the upward residuals are zero, so that estimate starts at nothing and learns more slowly.
UPWARD_WEIGHT = 16

SECOND_DIFFERENCE = math.sqrt(math.pi / 2) / math.sqrt(6)
UPWARD = math.sqrt(2 * math.pi)


@dataclass(slots=True)
class Baseline:
    """The state above for one signal.

    Args:
        relative_floor: floor as a share of |level|.
        absolute_floor: floor in the signal's own unit; the larger of the two counts.
        prior: deviation assumed at first; a share of the first value where the floor is relative, else
            absolute.
    """

    relative_floor: float
    absolute_floor: float
    prior: float = PRIOR
    count: int = 0  # values of this stretch
    learned: int = 0  # values that sigma was learned from, over all stretches
    level: float = 0.0
    difference_sigma: float = 0.0
    upward_sigma: float = 0.0
    previous: float | None = None
    before_previous: float | None = None
    slow: float = 0.0
    lowest: float = 0.0
    lowest_sigma: float = 0.0  # sigma when it was that low
    spread: float = 1.0

    @property
    def sigma(self) -> float:
        return max(self.difference_sigma, self.upward_sigma)

    @property
    def floor(self) -> float:
        return max(self.relative_floor * abs(self.level), self.absolute_floor)

    def band(self) -> float:
        """Residuals up to here are ordinary."""
        return max(BAND_SIGMAS * self.sigma * self.spread, BAND_SHARE * self.floor)

    def limit(self) -> float:
        """Residuals above this begin an excursion at once."""
        return max(LIMIT_SIGMAS * self.sigma * self.spread, self.floor)

    def jumped(self, value: float) -> bool:
        """On a fall the level lags: whether ``value`` stands over the limit above the last two values instead.

        They count when both lie 2 sigma under the level, as two neighbours do once in 2,000 in noise without a trend.
        """
        previous, before, sigma = self.previous, self.before_previous, self.sigma
        if previous is None or before is None or self.level - max(previous, before) <= FALL_SIGMAS * sigma:
            return False
        bend = SECOND_DIFFERENCE * abs(value - 2 * previous + before)
        return value - max(previous, before) > self.limit() and bend > BAND_SIGMAS * sigma

    def drop_to_recent(self) -> None:
        """Set the level to where the last two values were."""
        self.level = max(x for x in (self.previous, self.before_previous) if x is not None)

    def creep(self) -> float:
        """How far the slow mean stands above its lowest value, as a share of what would be an excursion."""
        return 0.0 if self.slow <= self.lowest else (self.slow - self.lowest) / self.creep_limit()

    def creep_limit(self) -> float:
        # A run that slowly diverges grows noisier, too: its noise then must not hide the climb.
        sigma = min(self.sigma, 2 * self.lowest_sigma)
        return max(CREEP_SIGMAS * sigma, CREEP_FLOORS * self.floor, 1e-300)

    def start(self, value: float) -> None:
        """Begin, or begin again, at ``value``. What is known of the noise is kept."""
        if self.difference_sigma == 0.0:
            self.difference_sigma = self.prior * (abs(value) if self.relative_floor else 1.0)
        self.count = 1
        self.level = self.slow = self.lowest = value
        self.lowest_sigma = self.sigma
        self.previous, self.before_previous = value, None

    def accept(self, value: float) -> None:
        """Take an ordinary value in."""
        residual = value - self.level
        count = self.count = self.count + 1
        clip = BAND_SIGMAS * self.sigma
        self.level += max(LEVEL_GAIN, 1 / count) * residual
        self.learned += 1
        up = UPWARD * residual if residual > 0 else 0.0
        gain = max(SIGMA_GAIN, 1 / (self.learned + UPWARD_WEIGHT))
        self.upward_sigma += gain * (min(up, 2 * clip) - self.upward_sigma)
        if self.previous is not None and self.before_previous is not None:
            gain = max(SIGMA_GAIN, 2 / (self.learned + PRIOR_WEIGHT))
            bend = SECOND_DIFFERENCE * abs(value - 2 * self.previous + self.before_previous)
            self.difference_sigma += gain * (min(bend, clip) - self.difference_sigma)
        self.before_previous, self.previous = self.previous, value

    def settle(self) -> None:
        """Once every 16 accepted values: take the level into the slow mean, and let the spread shrink."""
        self.spread = max(1.0, self.spread * SPREAD_DECAY)
        self.slow += CREEP_GAIN * (self.level - self.slow)
        if self.slow <= self.lowest:
            self.lowest, self.lowest_sigma = self.slow, self.sigma

    def exceeded(self, values: int) -> None:
        """So many values over the band turned out to be no excursion of the run's state."""
        self.spread *= SPREAD_STEP**values

    def shift(self, by: float) -> None:
        """The signal's unit has changed: the whole baseline moves."""
        self.level += by
        self.slow += by
        self.lowest += by
        self.forget_neighbours()

    def forget_neighbours(self) -> None:
        """The next value is not the successor of the last one: no differences across the gap."""
        self.previous = self.before_previous = None

    def state(self) -> tuple[Any, ...]:
        """Everything that changes, in a fixed order."""
        state: tuple[Any, ...] = _STATE(self)
        return state

    def restore(self, state: Sequence[Any]) -> None:
        for name, value in zip(_CHANGING, state, strict=True):
            setattr(self, name, value)


_CHANGING = tuple(field.name for field in fields(Baseline))[3:]
_STATE = attrgetter(*_CHANGING)

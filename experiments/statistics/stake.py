"""One stake on several laws: evidence that holds at every look, whichever law fits the values.

One cannot choose a claim's law anew at each look: the larger of two e-values is none. So the claim divides a stake of 1 before the
runs,

    E = max_i w_i E_i,    sum_i w_i <= 1,

which stays below sum_i w_i E_i, and a mixture of e-processes is one under their common "no difference". A law that does not fit the
values seen so far (Student's after a run that died) counts as 0 at that look, which can only lower E. Three quarters go to the
fitting law while it fits, a quarter to the order of values, which always does: that costs a fit .3 nats of evidence, less than a
run. Intervals follow: law i's at level w_i alpha, and where several fit, their intersection.

The first look settles which laws take part, by facts that do not change if an arm's and a baseline's runs change places
(``choice``), so the choice is no bet by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from experiments.statistics.law import InterimLook, Law
from experiments.statistics.ranks import RankSum

FITTING = 0.75


@dataclass(frozen=True)
class Stake:
    """Laws that fit the values, each with its share of the stake; the first gives the effect."""

    parts: tuple[tuple[Law, float], ...]

    @property
    def name(self) -> str:
        return self.parts[0][0].name

    def bet(self) -> tuple[float, int]:
        """See ``Law.bet``."""
        log_e, side = -math.inf, 0
        for law, share in self.parts:
            own, its = law.bet()
            if own + math.log(share) > log_e:
                log_e, side = own + math.log(share), its
        return log_e, side

    def look(self, alpha: float) -> InterimLook:
        """The evidence with its interval."""
        looks = [law.look(share * alpha, sequential=True) for law, share in self.parts]
        low, high = max(look.low for look in looks), min(look.high for look in looks)
        if low > high:  # skewed values, whose mean and median disagree
            low, high = looks[0].low, looks[0].high
        log_e, side = self.bet()
        sign = side if log_e >= -math.log(alpha) else 0
        return InterimLook(effect=looks[0].effect, low=low, high=high, sign=sign, log_e=log_e)

    def within(self, margin: float, alpha: float) -> bool:
        """Whether the interval lies between ``-margin`` and ``margin``."""
        sides = [_inside(law, margin, share * alpha) for law, share in self.parts]
        return any(low for low, _ in sides) and any(high for _, high in sides)

    def detectable(self, alpha: float) -> float:
        """See ``Law.detectable``: of the first law, at its share."""
        law, share = self.parts[0]
        return law.detectable(share * alpha, sequential=True)


def _inside(law: Law, margin: float, alpha: float) -> tuple[bool, bool]:
    if isinstance(law, RankSum):
        return law.inside(margin, alpha)
    seen = law.look(alpha, sequential=True)
    return seen.low > -margin, seen.high < margin

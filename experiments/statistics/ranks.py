"""Order alone: exact for infinite values, counts, ties and any tail.

Under "no difference" a pair's difference is as likely up as down, and a group's label is exchangeable. So these are exact for every
distribution:

- paired, once: Wilcoxon's signed ranks (1945), zeros aside, ties with their mean rank, the null enumerated over all signs. The
  interval is that of the Walsh averages (d_i + d_j) / 2, the effect their median (Hodges and Lehmann 1963).
- paired, at every look, or against a constant: signs alone, a share with null 1/2 (``proportions``); the interval lies between two
  order statistics, the effect is the median.
- two groups, once: the rank sum (Wilcoxon 1945; Mann and Whitney 1947), the null enumerated over all choices of the arm's ranks;
  interval and effect from the differences a_i - b_j.
- two groups, at every look: ``orders``.

Two equal infinities are a tie: no evidence for either side, and no bound on the arms' distance.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from experiments.statistics import orders
from experiments.statistics.law import POWER, InterimLook
from experiments.statistics.proportions import detectable_share, least_wins, rejects_half, share_log_e

# Beyond these the normal null, its variance corrected for ties, replaces the enumerated one.
MOST_PAIRS, MOST_RUNS = 80, 80


@dataclass(frozen=True)
class Signs:
    """Differences of pairs, or values against a constant, by their signs; NaN: two equal infinities."""

    differences: np.ndarray
    name: str = "signs"

    def bet(self) -> tuple[float, int]:
        wins, n = self._counts()
        return share_log_e(wins, n), int(np.sign(2 * wins - n))

    def look(self, alpha: float, *, sequential: bool) -> InterimLook:
        wins, n = self._counts()
        rejected = rejects_half(wins, n, alpha, sequential=sequential)
        lows, ordered, highs = (np.sort(_filled(self.differences, tie)) for tie in (-math.inf, 0.0, math.inf))
        least = least_wins(len(ordered), alpha, sequential=sequential)
        bounded = least <= len(ordered)
        return InterimLook(
            effect=median(ordered),
            low=float(lows[len(ordered) - least]) if bounded else -math.inf,
            high=float(highs[least - 1]) if bounded else math.inf,
            sign=self.bet()[1] if rejected else 0,
            log_e=self.bet()[0],
        )

    def detectable(self, alpha: float, *, sequential: bool) -> float:
        share = detectable_share(len(self.differences), alpha, sequential=sequential)
        centred = _centred(_filled(self.differences, math.inf))
        if math.isinf(share) or not len(centred):
            return math.inf
        # The shift that leaves this share above zero.
        return float(np.quantile(np.abs(centred), 2 * share - 1, method="higher"))

    def _counts(self) -> tuple[int, int]:
        """Numbers of differences above zero, and of nonzero ones."""
        wins, losses = int(np.sum(self.differences > 0)), int(np.sum(self.differences < 0))
        return wins, wins + losses


@dataclass(frozen=True)
class SignedRanks:
    """Differences of pairs, for one look; NaN: two equal infinities."""

    differences: np.ndarray
    name: str = "signed ranks"

    def bet(self) -> tuple[float, int]:
        return Signs(self.differences).bet()

    def look(self, alpha: float, *, sequential: bool) -> InterimLook:
        if sequential:
            return Signs(self.differences).look(alpha, sequential=True)
        d = _filled(self.differences, 0.0)
        d = d[d != 0]
        p, centre = signed_rank_p(d)
        averages = np.sort(_walsh(self.differences, tie=0.0))
        out = _most_outside(len(self.differences), alpha)
        lows = np.sort(_walsh(self.differences, tie=-math.inf))
        highs = np.sort(_walsh(self.differences, tie=math.inf))
        return InterimLook(
            effect=median(averages),
            low=float(lows[out]) if out >= 0 else -math.inf,
            high=float(highs[len(highs) - 1 - out]) if out >= 0 else math.inf,
            sign=int(np.sign(centre)) if p <= alpha else 0,
            log_e=self.bet()[0],
        )

    def detectable(self, alpha: float, *, sequential: bool) -> float:
        if sequential:
            return Signs(self.differences).detectable(alpha, sequential=True)
        n, centred = len(self.differences), _centred(_filled(self.differences, math.inf))
        if _most_outside(n, alpha) < 0 or not len(centred):
            return math.inf
        walsh = np.abs(_walsh(centred, tie=0.0))
        deviation = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        share = 0.5 + (-special.ndtri(alpha / 2) + special.ndtri(POWER)) * deviation / (n * (n + 1) / 2)
        return float(np.quantile(walsh, 2 * share - 1, method="higher")) if share <= 1 else math.inf


@dataclass(frozen=True)
class RankSum:
    """Two groups."""

    arm: np.ndarray
    baseline: np.ndarray
    name: str = "rank sum"

    def bet(self) -> tuple[float, int]:
        above, below = orders.log_e_values(self.arm, self.baseline)
        # Each direction carries half of the bet.
        return max(above, below) - math.log(2), int(np.sign(above - below))

    def look(self, alpha: float, *, sequential: bool) -> InterimLook:
        effect = median(np.sort(self._shifts(tie=0.0)))
        log_e, side = self.bet()
        if sequential:
            low, high = self._sequence(alpha)
            sign = side if log_e >= -math.log(alpha) else 0
            return InterimLook(effect=effect, low=low, high=high, sign=sign, log_e=log_e)
        p, centre = rank_sum_p(self.arm, self.baseline)
        out = _most_below(len(self.arm), len(self.baseline), alpha)
        lows, highs = np.sort(self._shifts(tie=-math.inf)), np.sort(self._shifts(tie=math.inf))
        return InterimLook(
            effect=effect,
            low=float(lows[out]) if out >= 0 else -math.inf,
            high=float(highs[len(highs) - 1 - out]) if out >= 0 else math.inf,
            sign=int(np.sign(centre)) if p <= alpha else 0,
            log_e=log_e,
        )

    def detectable(self, alpha: float, *, sequential: bool) -> float:
        """The shift at which a pair's arm lies above its baseline often enough, after Noether (1987)."""
        na, nb = len(self.arm), len(self.baseline)
        information = 12 * na * nb / (na + nb + 1)
        boundary = (
            math.sqrt(-2 * math.log(alpha) + math.log1p(4 * na * nb / (na + nb)))
            if sequential
            else -special.ndtri(alpha / 2)
        )
        if not sequential and _most_below(na, nb, alpha) < 0:
            return math.inf
        share = 0.5 + float(boundary + special.ndtri(POWER)) / math.sqrt(information)
        centred = _centred(self._shifts(tie=math.inf))
        if share > 1 or not len(centred):
            return math.inf
        return float(np.quantile(np.abs(centred), 2 * share - 1, method="higher"))

    def _shifts(self, *, tie: float) -> np.ndarray:
        """All a_i - b_j; ``tie`` for two equal infinities."""
        return difference(self.arm[:, None], self.baseline[None, :], tie=tie).ravel()

    def inside(self, margin: float, alpha: float) -> tuple[bool, bool]:
        """Whether the sequence's low end lies above ``-margin``, and its high end below ``margin``: this takes two bets, the ends
        themselves some twenty.
        """
        steps = self._shifts(tie=math.nan)
        steps = np.unique(steps[np.isfinite(steps)])
        goal = math.log(2 / alpha)

        def above(arm: np.ndarray, baseline: np.ndarray, points: np.ndarray) -> bool:
            after = points[points > -margin]
            if not len(after):
                return False
            # The low end is a point of the next ones if a shift between -margin and them is too low.
            shift = (after[0] - margin) / 2
            return bool(orders.log_e_values(arm - shift, baseline)[0] >= goal)

        return above(self.arm, self.baseline, steps), above(-self.arm, -self.baseline, -steps[::-1])

    def _sequence(self, alpha: float) -> tuple[float, float]:
        """The shifts that neither direction's bet rejects at half the level. Either bet is monotone in the shift, and constant
        between two of the finite differences a_i - b_j, so bisection among those finds each end.
        """
        steps = self._shifts(tie=math.nan)
        steps = np.unique(steps[np.isfinite(steps)])
        goal = math.log(2 / alpha)

        def low_end(arm: np.ndarray, baseline: np.ndarray, points: np.ndarray) -> float:
            def rejected(k: int) -> bool:
                """Whether a shift just under points[k] is too low."""
                gap = (points[k] - points[k - 1]) / 2 if k else max(1.0, abs(points[0]))
                return orders.log_e_values(arm - (points[k] - gap), baseline)[0] >= goal

            if not len(points) or not rejected(0):
                return -math.inf
            first, last = 0, len(points)  # rejected at first, not (or beyond the points) at last
            while last - first > 1:
                middle = (first + last) // 2
                first, last = (middle, last) if rejected(middle) else (first, middle)
            return float(points[first])

        return (
            low_end(self.arm, self.baseline, steps),
            -low_end(-self.arm, -self.baseline, -steps[::-1]),
        )


def difference(a: np.ndarray, b: np.ndarray, *, tie: float = 0.0) -> np.ndarray:
    """a - b; ``tie`` for two equal infinities."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(a) & (a == b), tie, a - b)


def median(ordered: np.ndarray) -> float:
    """The median of sorted values that may be infinite; NaN without any, or halfway between the two infinities."""
    if not len(ordered):
        return math.nan
    low, high = float(ordered[(len(ordered) - 1) // 2]), float(ordered[len(ordered) // 2])
    if low == high:
        return low
    return (low + high) / 2


def signed_rank_p(d: np.ndarray) -> tuple[float, float]:
    """Two-sided exact p of Wilcoxon's signed ranks for differences without zeros, and the statistic less its mean."""
    if not len(d):
        return 1.0, 0.0
    doubled = np.rint(2 * stats.rankdata(np.abs(d))).astype(np.int64)
    total, seen = int(doubled.sum()), int(doubled[d > 0].sum())
    centre = seen - total / 2
    if len(d) > MOST_PAIRS:
        deviation = math.sqrt(float(np.sum(doubled.astype(float) ** 2)) / 4)
        return min(1.0, 2 * float(special.ndtr(-max(0.0, abs(centre) - 1) / deviation))), centre
    return _two_sided(_sums_of_signs(tuple(np.sort(doubled).tolist())), seen), centre


def rank_sum_p(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Two-sided exact p of the rank sum of ``a`` among both, ties with their mean rank, and the statistic less its mean."""
    doubled = np.rint(2 * stats.rankdata(np.concatenate([a, b]))).astype(np.int64)
    seen, mean = int(doubled[: len(a)].sum()), len(a) * float(doubled.mean())
    if len(doubled) > MOST_RUNS:
        return float(stats.mannwhitneyu(a, b, method="asymptotic").pvalue), seen - mean
    law = _sums_of(tuple(np.sort(doubled).tolist()), len(a))
    return _two_sided(law, seen), seen - mean


@functools.lru_cache(maxsize=512)
def _sums_of(ranks: tuple[int, ...], chosen: int) -> np.ndarray:
    """P(sum = s) for a random choice of ``chosen`` of the ranks: [s]."""
    counts = np.zeros((chosen + 1, sum(ranks) + 1))
    counts[0, 0] = 1.0
    for rank in ranks:
        counts[1:, rank:] += counts[:-1, : counts.shape[1] - rank].copy()
    law: np.ndarray = counts[chosen] / counts[chosen].sum()
    return law


@functools.lru_cache(maxsize=512)
def _sums_of_signs(ranks: tuple[int, ...]) -> np.ndarray:
    """P(sum of the ranks with a plus = s) for random signs: [s]."""
    law = np.zeros(sum(ranks) + 1)
    law[0] = 1.0
    for rank in ranks:
        halved = law / 2
        law = halved.copy()
        law[rank:] += halved[: len(law) - rank]
    return law


def _two_sided(law: np.ndarray, seen: int) -> float:
    # Rounding limits the sums of probabilities; a p equal to the level must not miss it by that.
    return min(1.0, 2 * float(min(law[: seen + 1].sum(), law[seen:].sum()))) * (1 - 1e-12)


def _most_outside(n: int, alpha: float) -> int:
    """How many Walsh averages may lie outside on either side; -1 where no n of this size bounds anything."""
    if n > MOST_PAIRS:
        return _normal_count(n * (n + 1) / 4, math.sqrt(n * (n + 1) * (2 * n + 1) / 24), alpha)
    law = _sums_of_signs(tuple(range(1, n + 1)))
    return int(np.searchsorted(np.cumsum(law) * (1 - 1e-12), alpha / 2, side="right")) - 1


def _most_below(na: int, nb: int, alpha: float) -> int:
    """How many of the differences a_i - b_j may lie outside on either side; -1 where none bounds anything."""
    if na + nb > MOST_RUNS:
        return _normal_count(na * nb / 2, math.sqrt(na * nb * (na + nb + 1) / 12), alpha)
    law = _sums_of(tuple(range(1, na + nb + 1)), na)[na * (na + 1) // 2 :]
    return int(np.searchsorted(np.cumsum(law) * (1 - 1e-12), alpha / 2, side="right")) - 1


def _normal_count(mean: float, deviation: float, alpha: float) -> int:
    return math.floor(mean - float(-special.ndtri(alpha / 2)) * deviation - 0.5)


def _walsh(d: np.ndarray, *, tie: float) -> np.ndarray:
    """(d_i + d_j) / 2 for i <= j; ``tie`` where the two are opposite infinities or a value is a tie of infinities (NaN)."""
    i, j = np.triu_indices(len(d))
    with np.errstate(invalid="ignore"):
        averages = (d[i] + d[j]) / 2
    return np.where(np.isnan(averages), tie, averages)


def _filled(d: np.ndarray, tie: float) -> np.ndarray:
    """The differences, with ``tie`` for those of two equal infinities."""
    return np.where(np.isnan(d), tie, d)


def _centred(d: np.ndarray) -> np.ndarray:
    """The values less their median, which must be finite; else none."""
    centre = median(np.sort(d))
    return d - centre if math.isfinite(centre) else d[:0]

"""Shares: how often the arm wins a pair, how many runs of a group survive.

k successes among n at the null share 1/2 (or any theta), once: the binomial test and Clopper and Pearson's interval (1934). At
every look: the likelihood ratio of a Beta(a, a) mixture,

    E = B(a + k, a + n - k) / B(a, a) / (theta^k (1 - theta)^(n - k)),

a martingale under theta whatever n does (Ville 1939; Robbins 1970). With a = 1/4 six wins of six decide at 5 %.

Pairs of yes and no: pairs that agree say nothing of the difference; the others are a share with null 1/2 (McNemar 1947). The
difference of rates is then (share of discordant pairs) x (2 theta - 1), and its interval combines the intervals of both. Two
groups: Fisher's exact test once; at every look two Bernoulli streams, each block of one run an arm betting on the means so far
against their average (Turner, Ly and Grünwald, arXiv:2106.02693), exact for every common rate.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from experiments.statistics.law import POWER, InterimLook

MIXTURE = 0.25
# Turner, Ly and Grünwald's default prior of a group's rate, Beta(0.18, 0.18).
RATE_PRIOR = 0.18


def share_log_e(k: int, n: int, theta: float = 0.5) -> float:
    """Natural logarithm of the beta mixture's E-value for k of n against a share of ``theta``."""
    against = special.xlogy(k, theta) + special.xlog1py(n - k, -theta)
    mixed = special.betaln(MIXTURE + k, MIXTURE + n - k) - special.betaln(MIXTURE, MIXTURE)
    return float(mixed - against)


def share_bounds(k: int, n: int, alpha: float, *, sequential: bool) -> tuple[float, float]:
    """The interval of a share after k of n."""
    if n == 0:
        return 0.0, 1.0
    if not sequential:
        low = float(stats.beta.ppf(alpha / 2, k, n - k + 1)) if k else 0.0
        high = float(stats.beta.isf(alpha / 2, k + 1, n - k)) if k < n else 1.0
        return low, high

    def excess(theta: float) -> float:
        return share_log_e(k, n, theta) + math.log(alpha)

    # E has its minimum at the observed share and is infinite at a border that the data exclude.
    edge, seen = 1e-12, min(max(k / n, 1e-12), 1 - 1e-12)
    low = float(optimize.brentq(excess, edge, seen)) if k and excess(edge) > 0 else 0.0
    high = float(optimize.brentq(excess, seen, 1 - edge)) if k < n and excess(1 - edge) > 0 else 1.0
    return low, high


def least_wins(n: int, alpha: float, *, sequential: bool) -> int:
    """The fewest successes of n that reject a share of 1/2; n + 1 where not even n would."""
    for k in range(n // 2 + 1, n + 1):
        if rejects_half(k, n, alpha, sequential=sequential):
            return k
    return n + 1


def rejects_half(k: int, n: int, alpha: float, *, sequential: bool) -> bool:
    """Whether k of n reject a share of 1/2."""
    if sequential:
        return share_log_e(k, n) >= -math.log(alpha)
    return n > 0 and float(stats.binomtest(k, n).pvalue) <= alpha


def detectable_share(n: int, alpha: float, *, sequential: bool) -> float:
    """The share above 1/2 that n trials would have found with a power of 80 %; infinite where there is none."""
    least = least_wins(n, alpha, sequential=sequential)
    # P(Bin(n, theta) >= least) = POWER, solved by the beta distribution's quantile.
    return float(stats.beta.ppf(POWER, least, n - least + 1)) if least <= n else math.inf


@functools.lru_cache(maxsize=64)
def _rejected(n: int, alpha: float, sequential: bool) -> np.ndarray:
    """Whether ``won`` against ``lost`` pairs decide for the first: [won, lost], False where both exceed n together."""
    table = np.zeros((n + 1, n + 1), dtype=bool)
    for discordant in range(n + 1):
        least = least_wins(discordant, alpha, sequential=sequential)
        won = np.arange(least, discordant + 1)
        table[won, discordant - won] = True
    return table


@dataclass(frozen=True)
class PairedRates:
    """Pairs of yes (1) and no (0), as differences -1, 0, 1."""

    differences: np.ndarray
    name: str = "McNemar"

    def bet(self) -> tuple[float, int]:
        _, discordant, wins = self._counts()
        return share_log_e(wins, discordant), int(np.sign(2 * wins - discordant))

    def look(self, alpha: float, *, sequential: bool) -> InterimLook:
        n, discordant, wins = self._counts()
        decided = discordant > 0 and rejects_half(wins, discordant, alpha, sequential=sequential)
        few, many = share_bounds(discordant, n, alpha, sequential=sequential)
        low, high = (
            (2 * theta - 1) for theta in share_bounds(wins, discordant, alpha, sequential=sequential)
        )
        return InterimLook(
            effect=float(np.mean(self.differences)),
            # Each end takes the share of discordant pairs that makes the interval longest.
            low=low * (many if low < 0 else few),
            high=high * (many if high > 0 else few),
            sign=self.bet()[1] if decided else 0,
            log_e=self.bet()[0],
        )

    def detectable(self, alpha: float, *, sequential: bool) -> float:
        """The share of pairs that the effect turns one way, while chance turns as many either way as in these data."""
        n, discordant, wins = self._counts()
        noise = 2 * min(wins, discordant - wins) / max(n, 1)
        rejects = _rejected(n, alpha, sequential)
        won, lost = np.arange(n + 1)[:, None], np.arange(n + 1)[None, :]

        def short(effect: float) -> float:
            log_p = stats.multinomial.logpmf(
                np.stack(np.broadcast_arrays(won, lost, np.maximum(n - won - lost, 0)), axis=-1),
                n,
                [noise / 2 + effect, noise / 2, 1 - noise - effect],
            )
            return float(np.exp(log_p)[rejects].sum()) - POWER

        largest = 1 - noise
        return float(optimize.brentq(short, 0.0, largest, xtol=1e-4)) if short(largest) > 0 else math.inf

    def _counts(self) -> tuple[int, int, int]:
        return (
            len(self.differences),
            int(np.count_nonzero(self.differences)),
            int(np.sum(self.differences > 0)),
        )


@dataclass(frozen=True)
class UnpairedRates:
    """Two groups of yes (1) and no (0)."""

    arm: np.ndarray
    baseline: np.ndarray
    name: str = "two rates"

    def bet(self) -> tuple[float, int]:
        effect = float(np.mean(self.arm) - np.mean(self.baseline))
        return two_rates_log_e(self.arm, self.baseline), int(np.sign(effect))

    def look(self, alpha: float, *, sequential: bool) -> InterimLook:
        ka, kb, na, nb = int(self.arm.sum()), int(self.baseline.sum()), len(self.arm), len(self.baseline)
        effect = ka / na - kb / nb
        log_e, side = self.bet()
        if sequential:
            # Both rates within their own sequences at once: each at half the level.
            (al, ah), (bl, bh) = (
                share_bounds(k, n, alpha / 2, sequential=True) for k, n in ((ka, na), (kb, nb))
            )
            low, high, decided = al - bh, ah - bl, log_e >= -math.log(alpha)
        else:
            (al, ah), (bl, bh) = (
                share_bounds(k, n, alpha, sequential=False) for k, n in ((ka, na), (kb, nb))
            )
            low = effect - math.hypot(ka / na - al, bh - kb / nb)  # Newcombe 1998, method 10's way
            high = effect + math.hypot(ah - ka / na, kb / nb - bl)
            table = [[ka, na - ka], [kb, nb - kb]]
            decided = float(stats.fisher_exact(np.array(table)).pvalue) <= alpha
        return InterimLook(effect=effect, low=low, high=high, sign=side if decided else 0, log_e=log_e)

    def detectable(self, alpha: float, *, sequential: bool) -> float:
        """Uses the normal approximation at the baseline's rate, with the boundary of the average pair."""
        n = len(self.arm) * len(self.baseline) / (len(self.arm) + len(self.baseline))
        rate = (self.arm.sum() + self.baseline.sum() + 1) / (len(self.arm) + len(self.baseline) + 2)
        boundary = (
            math.sqrt(-2 * math.log(alpha) + math.log1p(4 * n)) if sequential else -special.ndtri(alpha / 2)
        )
        size = float((boundary + special.ndtri(POWER)) * math.sqrt(rate * (1 - rate) / n))
        return size if size <= 1 else math.inf


def two_rates_log_e(arm: np.ndarray, baseline: np.ndarray) -> float:
    """Natural logarithm of Turner, Ly and Grünwald's E-value, in blocks of one run per arm; runs without a partner wait."""
    n = min(len(arm), len(baseline))
    before = np.arange(n) + 2 * RATE_PRIOR
    bets = (
        [(RATE_PRIOR + np.concatenate(([0], np.cumsum(y[:n])[:-1]))) / before for y in (arm, baseline)]
        if n
        else []
    )
    if not bets:
        return 0.0
    common = (bets[0] + bets[1]) / 2
    log_e = 0.0
    for y, bet in zip((arm[:n], baseline[:n]), bets, strict=True):
        log_e += float(
            np.sum(special.xlogy(y, bet / common) + special.xlogy(1 - y, (1 - bet) / (1 - common)))
        )
    return log_e

"""Student's t: for one look, and as an e-process for every look.

With m the information in runs (n for n differences, na nb / (na + nb) for two groups), nu the degrees of freedom and t the usual
statistic, the effect in standard deviations gets the prior N(0, g), the unknown scale its right Haar prior 1 / sigma:

    E = (1 + m g)^(-1/2) [ (1 + t^2 / nu) / (1 + t^2 / (nu (1 + m g))) ]^((nu + 1) / 2)

(Lai 1976; Wang and Ramdas, arXiv:2310.03722). For normal data E is a martingale whatever the scale is, as long as one looks only at
scale-free statistics. It grows in |t|, so that {mu: E(mu) < 1 / alpha} is an interval mean +- t* s / sqrt(m) with t* in closed
form. Heavy tails of identical arms make t smaller, not larger (Efron 1969), hence E conservative; this law does not suit data on a
coarse grid, whose sd may be 0 by chance, and ``decision`` gives it none.

The groups' variances may differ, and neither way of estimating is right for both cases. The interval for one look has min(na, nb) -
1 degrees of freedom, with which the level holds for any two variances (Mickey and Brown 1966). The e-process is the smaller of that
with the pooled variance, exact where the variances are equal, and that with Welch's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from experiments.statistics.law import POWER, InterimLook

# Variance of the effect, in standard deviations, under the mixture. 4: an effect of 2 sd is typical for a treatment that matters on
# a stable outcome, and four seeds can decide it (g must pass 1.6 for that); for an effect of half an sd this costs some 15 % more
# seeds than the best g.
PRIOR_VARIANCE = 4.0


def log_e_value(t: float, nu: float, m: float) -> float:
    """Natural logarithm of E for statistic ``t`` with ``nu`` degrees of freedom and information ``m``."""
    if nu <= 0:
        return 0.0
    shrunk = 1 + m * PRIOR_VARIANCE
    if math.isinf(t):
        return (nu / 2) * math.log(shrunk)
    x = t * t / nu
    return -0.5 * math.log(shrunk) + (nu + 1) / 2 * (math.log1p(x) - math.log1p(x / shrunk))


def critical(alpha: float, nu: float, m: float) -> float:
    """The |t| at which E reaches 1 / alpha; infinite where it never does."""
    if nu <= 0:
        return math.inf
    shrunk = 1 + m * PRIOR_VARIANCE
    exponent = (2 / (nu + 1)) * (-math.log(alpha) + 0.5 * math.log(shrunk))
    if exponent >= math.log(shrunk):
        return math.inf
    ratio = math.exp(exponent)
    return math.sqrt(nu * (ratio - 1) / (1 - ratio / shrunk))


@dataclass(frozen=True)
class PairedT:
    """Differences of pairs."""

    differences: np.ndarray
    name: str = "paired t"

    def bet(self) -> tuple[float, int]:
        mean, error, n = self._moments()
        return log_e_value(_statistic(mean, error), n - 1, n), int(np.sign(mean))

    def look(self, alpha: float, *, sequential: bool) -> InterimLook:
        mean, error, _ = self._moments()
        half = _times(self._critical(alpha, sequential), error)
        return _evidence(mean, half, self.bet()[0])

    def detectable(self, alpha: float, *, sequential: bool) -> float:
        _, error, n = self._moments()
        return _detectable(self._critical(alpha, sequential), n - 1, error)

    def _moments(self) -> tuple[float, float, int]:
        n = len(self.differences)
        error = float(np.std(self.differences, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
        return float(np.mean(self.differences)), error, n

    def _critical(self, alpha: float, sequential: bool) -> float:
        n = len(self.differences)
        if n < 2:
            return math.inf
        return critical(alpha, n - 1, n) if sequential else -float(special.stdtrit(n - 1, alpha / 2))


@dataclass(frozen=True)
class UnpairedT:
    """Two groups."""

    arm: np.ndarray
    baseline: np.ndarray
    name: str = "Welch t"

    def bet(self) -> tuple[float, int]:
        effect, information = self._effect(), self._information()
        log_e = min(log_e_value(_statistic(effect, error), nu, information) for error, nu in self._errors())
        return log_e, int(np.sign(effect))

    def look(self, alpha: float, *, sequential: bool) -> InterimLook:
        half = max(_times(self._critical(alpha, nu, sequential), error) for error, nu in self._errors())
        return _evidence(self._effect(), half, self.bet()[0])

    def detectable(self, alpha: float, *, sequential: bool) -> float:
        pooled = len(self.arm) + len(self.baseline) - 2
        return max(
            _detectable(self._critical(alpha, nu, sequential), pooled, error) for error, nu in self._errors()
        )

    def _effect(self) -> float:
        return float(np.mean(self.arm) - np.mean(self.baseline))

    def _information(self) -> float:
        return len(self.arm) * len(self.baseline) / (len(self.arm) + len(self.baseline))

    def _errors(self) -> list[tuple[float, float]]:
        """Standard error of the effect and its degrees of freedom, by Welch and from the pooled variance."""
        na, nb = len(self.arm), len(self.baseline)
        if min(na, nb) < 2:
            return [(math.inf, 0.0)]
        a, b = float(np.var(self.arm, ddof=1)) / na, float(np.var(self.baseline, ddof=1)) / nb
        pooled = (a * na * (na - 1) + b * nb * (nb - 1)) / (na + nb - 2)
        # Satterthwaite, in shares of a + b: their squares cannot underflow.
        share = a / (a + b) if a + b > 0 else 0.5
        welch = 1 / (share**2 / (na - 1) + (1 - share) ** 2 / (nb - 1))
        return [
            (math.sqrt(a + b), welch),
            (math.sqrt(pooled / self._information()), na + nb - 2),
        ]

    def _critical(self, alpha: float, nu: float, sequential: bool) -> float:
        if nu <= 0:
            return math.inf
        if sequential:
            return critical(alpha, nu, self._information())
        return -float(special.stdtrit(min(len(self.arm), len(self.baseline)) - 1, alpha / 2))


def _evidence(effect: float, half: float, log_e: float) -> InterimLook:
    sign = int(np.sign(effect)) if abs(effect) > half else 0
    return InterimLook(effect=effect, low=effect - half, high=effect + half, sign=sign, log_e=log_e)


def _statistic(effect: float, error: float) -> float:
    if error > 0:
        return effect / error
    return math.copysign(math.inf, effect) if effect else 0.0


def _times(factor: float, error: float) -> float:
    return math.inf if math.isinf(factor) else factor * error


def _detectable(boundary: float, nu: float, error: float) -> float:
    """The effect whose noncentral t passes ``boundary`` with a probability of ``POWER``."""
    if math.isinf(boundary) or math.isinf(error):
        return math.inf
    wide = boundary + 12 * (1 + boundary / math.sqrt(nu))
    shift = optimize.brentq(
        lambda ncp: float(stats.nct.sf(boundary, nu, ncp)) - POWER, 0.0, wide, xtol=1e-6 * wide
    )
    return float(shift) * error

"""How often a verdict is false, and how often a true one is found, by simulation.

*False*: two arms without a difference get seeds one by one until a verdict comes or the runs end. Per kind of data and design it is
the share of trials that end in "supported" or "against"; the guarantee is 5 % at most, however long one looks. *Family*: ten such
claims at once, their verdicts by Holm; the share of families with any false one. *Equivalent*: arms that differ by exactly the
margin; the share called equivalent. *Power*: arms that differ by the effect that ``decide`` calls detectable with that many runs;
the share found, 80 % or more if that is true.

    gaussian, heavy (Student's t of 2 degrees), skewed (log-normal, sd of the log 2), counts (Poisson of mean 2, and of 40),
    yes or no (rate .4), censored (30 % of the runs died), dies late (after the sixth run 30 % died),
    turns coarse (after the sixth run values are rounded to whole sds)

Beside each share the benchmark prints the upper end of its one-sided 99 % interval (Clopper and Pearson).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats

from experiments.statistics import LEAST_SEEDS, decide, holm
from stabilitylab.command_line import parse
from stabilitylab.errors import InputError

Draw = Callable[[np.random.Generator, int], np.ndarray]
LATE = 6


def _late(early: Draw, then: Draw) -> Draw:
    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        return np.concatenate([early(rng, min(n, LATE)), then(rng, max(0, n - LATE))])

    return draw


def _gaussian(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=n)


def _censored(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.where(rng.random(n) < 0.3, np.inf, rng.normal(size=n))


KINDS: Mapping[str, Draw] = {
    "gaussian": _gaussian,
    "heavy": lambda rng, n: rng.standard_t(2, n),
    "skewed": lambda rng, n: np.exp(2 * rng.normal(size=n)),
    "counts of 2": lambda rng, n: rng.poisson(2.0, n).astype(float),
    "counts of 40": lambda rng, n: rng.poisson(40.0, n).astype(float),
    "yes or no": lambda rng, n: (rng.random(n) < 0.4).astype(float),
    "censored": _censored,
    "dies late": _late(_gaussian, _censored),
    "turns coarse": _late(_gaussian, lambda rng, n: np.rint(rng.normal(size=n))),
}
# Arms that differ by exactly a margin, in the unit of their effect.
APART: Mapping[str, tuple[float, Draw]] = {
    "gaussian": (0.8, lambda rng, n: rng.normal(0.8, 1.0, n)),
    "heavy": (1.5, lambda rng, n: 1.5 + rng.standard_t(2, n)),
    "counts of 40": (8.0, lambda rng, n: 8.0 + rng.poisson(40.0, n)),
    "yes or no": (0.3, lambda rng, n: (rng.random(n) < 0.7).astype(float)),
    "dies late": (0.8, lambda rng, n: 0.8 + KINDS["dies late"](rng, n)),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How often verdicts are false, and true ones found.

    Attributes:
        trials: trials of each kind and design.
        families: families of ten claims, of each kind.
        runs: most runs of an arm.
        json: print one JSON object.
    """

    trials: int = 1000
    families: int = 200
    runs: int = 30
    json: bool = False


def main(argv: Sequence[str]) -> int:
    settings: Settings = parse(Settings, argv, program="python -m experiments.benchmarks verdict_error")
    if settings.runs < LEAST_SEEDS or settings.trials < 1 or settings.families < 1:
        raise InputError(f"give at least {LEAST_SEEDS} runs, one trial and one family")
    found = {
        "false": {
            f"{kind}, {design}": false_verdicts(kind, design == "paired", settings)
            for kind in track(KINDS, "false verdicts", console=Console(stderr=True), disable=settings.json)
            for design in ("paired", "groups")
        },
        "family": {
            kind: false_families(kind, settings)
            for kind in track(KINDS, "families", console=Console(stderr=True), disable=settings.json)
        },
        "equivalent": {
            f"{kind}, {design}": false_equivalence(kind, design == "paired", settings)
            for kind in APART
            for design in ("paired", "groups")
        },
        "power": {
            f"{n} {design}, {'looking' if looking else 'once'}": power(
                n, design == "pairs", looking, settings
            )
            for n in (6, 12)
            for design in ("pairs", "groups")
            for looking in (True, False)
        },
    }
    if settings.json:
        print(json.dumps({"settings": dataclasses.asdict(settings), **found}))
        return 0
    table = Table("what", "data", "trials", "share", "at most (99 %)")
    for what, rows in found.items():
        for name, (hits, trials) in rows.items():
            table.add_row(what, name, str(trials), f"{hits / trials:.3f}", f"{upper(hits, trials):.3f}")
    Console().print(table)
    return 0


def upper(hits: int, trials: int) -> float:
    """The upper end of a share's one-sided 99 % interval."""
    return float(stats.beta.ppf(0.99, hits + 1, trials - hits)) if hits < trials else 1.0


def false_verdicts(kind: str, paired: bool, settings: Settings) -> tuple[int, int]:
    """Trials without an effect that told the arms apart, and trials."""
    hits = 0
    for trial in range(settings.trials):
        rng = np.random.default_rng([trial, 1])
        arm, baseline = (KINDS[kind](rng, settings.runs) for _ in range(2))
        hits += decide(arm.tolist(), baseline.tolist(), paired=paired).verdict != "undecided"
    return hits, settings.trials


def false_families(kind: str, settings: Settings) -> tuple[int, int]:
    """Families of ten claims without an effect with one or more that hold by Holm, and families."""
    hits = 0
    for family in range(settings.families):
        rng = np.random.default_rng([family, 2])
        p_values = [
            decide(KINDS[kind](rng, settings.runs).tolist(), KINDS[kind](rng, settings.runs).tolist()).p_value
            for _ in range(10)
        ]
        hits += min(holm(p_values)) <= 0.05
    return hits, settings.families


def false_equivalence(kind: str, paired: bool, settings: Settings) -> tuple[int, int]:
    """Trials that called arms equivalent that differ by the margin, and trials."""
    hits, (margin, further) = 0, APART[kind]
    for trial in range(settings.trials):
        rng = np.random.default_rng([trial, 3])
        arm, baseline = further(rng, settings.runs), KINDS[kind](rng, settings.runs)
        verdict = decide(arm.tolist(), baseline.tolist(), paired=paired, margin=margin).verdict
        hits += verdict == "equivalent"
    return hits, settings.trials


def power(n: int, paired: bool, looking: bool, settings: Settings) -> tuple[int, int]:
    """Trials of ``n`` Gaussian runs per arm that found the effect called detectable, and trials."""
    hits = 0
    # The effect from a sample whose spread is exactly the population's.
    exact = stats.norm.ppf((np.arange(n) + 0.5) / n)
    exact = (exact - exact.mean()) / exact.std(ddof=1)
    arm, baseline = (exact * math.sqrt(2), 1e-9 * exact) if paired else (exact, exact)
    effect = decide(arm.tolist(), baseline.tolist(), paired=paired, sequential=looking).detectable
    for trial in range(settings.trials):
        rng = np.random.default_rng([trial, 4])
        x, y = rng.normal(size=n) - effect, rng.normal(size=n)
        hits += decide(x.tolist(), y.tolist(), paired=paired, sequential=looking).verdict == "supported"
    return hits, settings.trials


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

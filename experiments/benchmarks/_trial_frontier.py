"""Compares the stability margin with the frontier: the rate that it foresees, and the rate that bisection finds.

Small GPTs of 1 to 4 blocks with beta1 of 0 to .95 and beta2 of .95 to .999 train 40 steps at 3e-3. There the margin times the rate
is the margin's forecast (the median of the last six measurements). From the same state, with the same batches and a constant rate,
seven bisections on a logarithmic scale from 1e-3 to 10 find the rate at which the run collapses within 40 steps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments.benchmarks._atlas_loop import AtlasLoop
from experiments.benchmarks._atlas_recipes import Recipe
from experiments.benchmarks._trial_runs import CALM, Watch
from experiments.trial import collapse_onset
from stabilitylab.attribution import LoopState

KEPT, HALVINGS, LOWEST, HIGHEST, MEASURED = 40, 7, 1e-3, 10.0, 12


def frontier_of(seed: int) -> dict[str, Any]:
    """One configuration's forecast by the margin, and its frontier; NaN where the margin is infinite."""
    dice = np.random.default_rng(seed)
    layers = int(dice.integers(1, 5))
    betas = float(dice.choice([0.0, 0.8, 0.9, 0.95])), float(dice.choice([0.95, 0.99, 0.999]))
    loop = AtlasLoop(
        Recipe(name="", family="", cause="", clip=0.0, planted=False), seed, 10**9, layers=layers
    )
    group = loop.optimizer.param_groups[0]
    group["betas"] = betas
    watch = Watch(loop)
    losses = [watch.step(step, 0.0) for step in range(CALM)]
    margins = [v for step, v in watch.found["margin"].items() if step >= CALM - MEASURED]
    watch.close()
    state = LoopState.of(loop, CALM)

    def collapses(rate: float) -> bool:
        state.put_into(loop)
        loop.optimizer.param_groups[0]["lr"] = rate
        seen = list(losses)
        for step in range(CALM, CALM + KEPT):
            seen.append(loop.train_step(step))
            if not seen[-1] <= min(losses) + 20.0:
                return True
        return collapse_onset(np.array(seen)) is not None

    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if collapses(math.exp(middle)) else (middle, high)
    foreseen = float(np.median(margins)) * group["lr"] if margins else math.nan
    return {
        "seed": seed,
        "layers": layers,
        "betas": betas,
        "foreseen": foreseen if math.isfinite(foreseen) else None,
        "frontier": math.exp((low + high) / 2),
    }


def correlation(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Rank correlation of both over configurations, and over those of one beta1 (mean of the groups)."""
    known = [row for row in rows if row["foreseen"] is not None]
    if len(known) < 5:
        return {"n": len(known)}
    foreseen, met = (np.array([row[name] for row in known]) for name in ("foreseen", "frontier"))
    found = spearmanr(foreseen, met)
    within = []
    for beta1 in sorted({row["betas"][0] for row in known}):
        chosen = np.array([row["betas"][0] == beta1 for row in known])
        if chosen.sum() >= 5:
            within.append(float(spearmanr(foreseen[chosen], met[chosen]).statistic))
    ratio = np.exp(np.quantile(np.log(foreseen / met), (0.25, 0.5, 0.75)))
    return {
        "n": len(known),
        "rank correlation": float(found.statistic),
        "p": float(found.pvalue),
        "at equal beta1, mean": float(np.mean(within)) if within else math.nan,
        **{f"foreseen over met, quartile {i}": float(q) for i, q in enumerate(ratio, start=1)},
    }

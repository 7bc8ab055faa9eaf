"""C13. The paper's ladder of positions and feed-forward, each rung at its own best rate.

One rate for all is a confounder: an arm may only need another one. ``best_rate`` finds each arm's best of three in a run of a seed
that is not judged (101); the study then judges the arm at that rate, on the fixed held-out rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import NEXT_TOKEN, PROXY, proxy_text
from experiments.suites.positions import SUITE as POSITIONS
from experiments.trial import trial
from experiments.verdicts import Claim
from glm.train.config import TrainConfig

RATES = tuple(2.0**power for power in (-7, -6, -5))
TUNING = (101,)


@lru_cache(maxsize=16)
def best_rate(config: TrainConfig, data: Path) -> float:
    """The rate with the lowest mean held-out loss over the tuning seeds."""
    mean = {
        rate: sum(trial(config, data=data, seed=seed, rate=rate).heldout for seed in TUNING) for rate in RATES
    }
    return min(mean, key=lambda rate: mean[rate])


def measure(cell: Cell) -> Mapping[str, float]:
    rate = best_rate(dataclasses.replace(cell.config, seed=0), cell.data)
    return {"heldout": trial(cell.config, data=cell.data, rate=rate).heldout, "rate": rate}


STUDY = Study(
    name="ladder",
    question="Does each rung of GLM-130B's ladder lower the loss, each at its own best rate?",
    arms=POSITIONS.arms,
    seeds=10,
    settings={**PROXY, **NEXT_TOKEN, "model.norm": "pre", "model.init": "gpt2", "steps": "150"},
    data=proxy_text,
    measure=measure,
    outcomes={"heldout": Outcome(title="Held-out loss at the arm's best rate", margin=0.02, unit="nats")},
    claims=(
        Claim(
            text="C13 ALiBi is better than learned positions",
            metric="heldout",
            arm="alibi",
            baseline="learned",
        ),
        Claim(text="C13 RoPE is better than ALiBi", metric="heldout", arm="rope", baseline="alibi"),
        Claim(text="C13 GeGLU is better than GELU", metric="heldout", arm="rope-geglu", baseline="rope"),
        Claim(
            text="C13 RoPE and GeGLU are better than learned positions and GELU",
            metric="heldout",
            arm="rope-geglu",
            baseline="learned",
        ),
    ),
    predictions=(
        "2026-11-29, before the runs: RoPE and ALiBi better than learned, the last claim supported; GeGLU open.",
    ),
)

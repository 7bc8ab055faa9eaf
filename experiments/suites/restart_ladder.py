"""GLM-130B's restart history at toy size: a new mixture of data at step 64, and what it takes to survive it.

GLM-130B at 22.8k: an abrupt multi-lingual mixture gave NaN after 100 steps; warm-up alone and a ramp of the mixture alone diverged;
a ramp of both held, with alpha .2 -> 1. Here Chinese comes to a model of English text at step 64 of 192, at a rate near the
frontier, in fp16.

All arms are one run up to the shift. Afterwards: abrupt; with the rate cut to .5 and raised again over 64 steps; the mixture ramped
over 64 steps; both; both with alpha .2 -> 1. The sampler draws a mixture in windows of 1,024 samples, 32 updates of this study, so
the shift lies between two windows, and the ramp takes two. A run is lost when its loss is (``Trial.died``), not when it leaves its
course, since a new mixture has another loss of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import PROXY, proxy_text
from experiments.trial import PATIENCE, trial
from experiments.verdicts import Claim
from glm.data.config import DataConfig
from glm.train.checkpoint import Checkpoint
from glm.train.config import TrainConfig
from glm.train.rate_schedule import ScheduleConfig
from glm.train.state_ring import StateRing

SHIFT, RAMP, END = 64, 64, 192
RATE = 2.0**-3.5
ROWS = 32
CLAIMED: tuple[tuple[str, str, Literal["less", "more"]], ...] = (
    ("norm_peak", "has a smaller gradient norm", "less"),
    ("lived", "lives longer", "more"),
)


def mixture(ramped: bool) -> DataConfig:
    """English up to the shift, then three tenths of it."""
    first = SHIFT * ROWS
    return DataConfig(
        mixture=(("en", 0.3), ("zh", 0.7)),
        mixture_before=(("en", 1.0), ("zh", 0.0)),
        mixture_ramp=(first, first + RAMP * ROWS) if ramped else (first, first),
    )


@lru_cache(maxsize=2)
def before_the_shift(config: TrainConfig, data: Path) -> Checkpoint | None:
    """The state at the shift, shared by the arms of a seed; None where the run was lost by then."""
    ring = StateRing(every=SHIFT, size=2)
    schedule = ScheduleConfig(peak=RATE, warmup=20, shape="constant")
    config = dataclasses.replace(config, steps=END, sampling=mixture(False), schedule=schedule)
    run = trial(config, data=data, until=SHIFT + 1, heldout=False, ring=ring)
    return None if run.died else ring.newest_at(SHIFT)


def measure(cell: Cell) -> Mapping[str, float]:
    ramped, warmed, shrunk = ("ramp" in cell.arm.name, "warm" in cell.arm.name, "alpha" in cell.arm.name)
    state = before_the_shift(cell.config, cell.data)
    if state is None or state.step != SHIFT:
        return {"lost_before": 1.0}
    # The schedule counts from the beginning, so that its warm-up is in the middle when the shift comes.
    after = ScheduleConfig(peak=RATE, warmup=SHIFT + RAMP if warmed else 0, shape="constant")
    if shrunk:
        after = dataclasses.replace(after, shrink_to=1.0, shrink_from_step=SHIFT, shrink_to_step=SHIFT + RAMP)
    embedding = dataclasses.replace(
        cell.config.model.embedding, gradient_shrink=0.2 if shrunk else 1.0, shrink_side="both"
    )
    config = dataclasses.replace(
        cell.config,
        steps=END,
        sampling=mixture(ramped),
        schedule=after,
        model=dataclasses.replace(cell.config.model, embedding=embedding),
    )
    run = trial(config, data=cell.data, start=state, heldout=False)
    finite = run.norm[np.isfinite(run.norm)]
    return {
        "collapsed": float(run.died),
        "lived": float(len(run.loss) - PATIENCE) if run.died else math.inf,
        "norm_peak": float(finite.max()) if len(finite) else math.inf,
        "last": math.inf if run.died else float(np.mean(run.loss[-20:])),
    }


STUDY = Study(
    name="restart-ladder",
    question="A new mixture of data at step 64: which of GLM-130B's restarts gets through?",
    arms=(
        Arm(name="abrupt", summary="the mixture changes at once"),
        Arm(name="warm", summary="the rate is cut to .5 and rises again over 64 steps"),
        Arm(name="ramp", summary="the mixture is ramped over 64 steps"),
        Arm(name="ramp-warm", summary="both"),
        Arm(name="ramp-warm-alpha", summary="both, alpha .2 -> 1"),
    ),
    first=101,
    seeds=10,
    settings={
        **PROXY,
        "precision": "fp16",
        "model.norm": "deepnorm",
        "model.length": "32",
        "objective.pieces": "1",
        "batch.rows": str(ROWS),
    },
    data=proxy_text,
    measure=measure,
    outcomes={
        "norm_peak": Outcome(title="Largest gradient norm after the shift", margin=0.1, scale="log"),
        "collapsed": Outcome(title="Collapsed after the shift", margin=0.2),
        "lived": Outcome(
            title="Steps from the shift to the collapse",
            margin=10,
            unit="steps",
            scale="rank",
            watched=END - SHIFT,
        ),
    },
    claims=tuple(
        Claim(
            text=f"A restart with {words} {what} than the abrupt shift",
            metric=metric,
            arm=arm,
            baseline="abrupt",
            direction=direction,
        )
        for metric, what, direction in CLAIMED
        for arm, words in (
            ("warm", "warm-up"),
            ("ramp", "a ramp"),
            ("ramp-warm", "both"),
            ("ramp-warm-alpha", "both and alpha"),
        )
    ),
    predictions=(
        "2026-11-29, before the runs: the ramp lowers the norm, the rate's warm-up less; few collapses at this size.",
        "2026-11-29, before the runs, of the steps to the collapse: undecided, since most runs live on.",
        "2026-11-29, after five seeds of a first version, whose shift fell into the middle of a window of the sampler, so that its "
        "abrupt arm had the new mixture from the start (set aside; seeds from 101 on are fresh): as above.",
    ),
)

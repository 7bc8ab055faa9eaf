"""GLM-130B's restart history at toy size: a new mixture of data at step 60, and what it takes to get through.

GLM-130B at 22.8k: an abrupt multi-lingual mixture gave NaN after 100 steps; warm-up alone and a ramp of the mixture alone diverged;
a ramp of both held, with alpha .2 -> 1. Here Chinese comes to a model of English text at step 60 of 140, at a rate near the
frontier, in fp16.

All arms are one run up to the shift. Afterwards: abrupt; with the rate cut to .6 and raised again over 40 steps; the mixture ramped
over 40 steps; both; both with alpha .2 -> 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import PROXY, proxy_text
from experiments.trial import trial
from experiments.verdicts import Claim
from glm.data.config import DataConfig
from glm.train.schedule import ScheduleConfig
from glm.train.state_ring import StateRing

SHIFT, RAMP, END = 60, 40, 140
RATE = 2.0**-3.5
ROWS = 8


CLAIMED: tuple[tuple[str, str, Literal["less", "more"]], ...] = (
    ("norm_peak", "has a smaller gradient norm", "less"),
    ("lived", "lives longer", "more"),
)


def measure(cell: Cell) -> Mapping[str, float]:
    ramped, warmed, shrunk = ("ramp" in cell.arm.name, "warm" in cell.arm.name, "alpha" in cell.arm.name)
    first = SHIFT * ROWS
    mixture = DataConfig(
        mixture=(("en", 0.3), ("zh", 0.7)),
        mixture_before=(("en", 1.0), ("zh", 0.0)),
        mixture_ramp=(first, first + RAMP * ROWS) if ramped else (first, first),
    )
    before = ScheduleConfig(peak=RATE, warmup=20, shape="constant")
    after = ScheduleConfig(peak=RATE, warmup=0, shape="constant")
    if shrunk:
        after = dataclasses.replace(after, shrink_to=1.0, shrink_from_step=SHIFT, shrink_to_step=SHIFT + RAMP)
    config = dataclasses.replace(cell.config, steps=END, sampling=mixture)
    ring = StateRing(every=SHIFT, size=2)
    lead_in = trial(
        dataclasses.replace(config, schedule=before),
        data=cell.data,
        until=SHIFT + 1,
        heldout=False,
        ring=ring,
    )
    state = ring.newest_at(SHIFT)
    if lead_in.died or state is None or state.step != SHIFT:
        return {"lost_before": 1.0}
    if warmed:
        # The schedule counts from the beginning, so that its warm-up is in the middle when the shift comes.
        after = dataclasses.replace(after, warmup=SHIFT + RAMP)
    embedding = dataclasses.replace(
        config.model.embedding, gradient_shrink=0.2 if shrunk else 1.0, shrink_side="both"
    )
    model = dataclasses.replace(config.model, embedding=embedding)
    run = trial(
        dataclasses.replace(config, schedule=after, model=model), data=cell.data, start=state, heldout=False
    )
    finite = run.norm[np.isfinite(run.norm)]
    peak = float(finite.max()) if len(finite) else math.inf
    onset = run.onset
    return {
        "collapsed": float(not run.survived),
        "lived": math.inf if onset is None else float(onset - SHIFT),
        "norm_peak": peak,
        "last": float(np.mean(run.loss[-20:])) if run.survived else math.inf,
    }


STUDY = Study(
    name="restart-ladder",
    question="A new mixture of data at step 60: which of GLM-130B's restarts gets through?",
    arms=(
        Arm(name="abrupt", summary="the mixture changes at once"),
        Arm(name="warm", summary="the rate is cut to .6 and rises again over 40 steps"),
        Arm(name="ramp", summary="the mixture is ramped over 40 steps"),
        Arm(name="ramp-warm", summary="both"),
        Arm(name="ramp-warm-alpha", summary="both, alpha .2 -> 1"),
    ),
    seeds=10,
    settings={**PROXY, "precision": "fp16", "model.norm": "deepnorm"},
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
    ),
)

"""C7, first half, on a grid of eighths of an octave: ``embedding-norm`` asks in steps as large as its smallest effect of interest.

There, after 38 seeds, 15 pairs lay half an octave up or more, 5 down and 18 at nothing: a shift of one step of the grid could
neither be told from none nor shown to be below the margin. Here a step is a quarter of the margin, between 2^-3.5 and 2^-.5, where
all frontiers lay. Seeds are fresh.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import PROXY, proxy_text
from experiments.trial import frontier, trial
from experiments.verdicts import Claim

EIGHTHS = tuple(np.arange(-3.5, -0.49, 0.125).tolist())


def measure(cell: Cell) -> Mapping[str, float]:
    return {
        "frontier": frontier(
            lambda rate: trial(cell.config, data=cell.data, rate=rate, heldout=False), EIGHTHS
        )
    }


STUDY = Study(
    name="embedding-norm-fine",
    question="Does a norm after the embedding raise the rate that a pre-LN model survives in fp16, by eighths of an octave?",
    arms=(
        Arm(name="plain", summary="pre-LN"),
        Arm(name="norm", summary="pre-LN, embedding norm", settings={"model.embedding.norm": ""}),
    ),
    first=201,
    seeds=24,
    settings={**PROXY, "precision": "fp16", "model.norm": "pre"},
    data=proxy_text,
    measure=measure,
    outcomes={"frontier": Outcome(title="Largest rate survived, log2", margin=0.5, unit="octaves")},
    claims=(
        Claim(
            text="C7 An embedding norm raises the rate that is survived",
            metric="frontier",
            arm="norm",
            baseline="plain",
            direction="more",
            source="BLOOM (2211.05100)",
        ),
    ),
    predictions=(
        "2026-11-29, before the runs, after those of embedding-norm: a gain of .1 to .2 octaves, so equivalent within half an "
        "octave.",
    ),
)

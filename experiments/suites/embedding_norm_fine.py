"""C7, first half, on a grid of eighths of an octave: ``embedding-norm`` asks in steps as large as its smallest effect of interest.

There, after 38 seeds, 15 pairs lay half an octave up or more, 5 down and 18 at zero: the data could neither tell a shift of one
step of the grid from none nor show it to be below the margin. Here a step is a quarter of the margin, between 2^-3.5 and 2^-.5,
where all frontiers lay. Seeds are fresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from experiments.study import Cell, Outcome, Study
from experiments.suites import embedding_norm
from experiments.trial import frontier, trial

EIGHTHS = tuple(np.arange(-3.5, -0.49, 0.125).tolist())


def measure(cell: Cell) -> Mapping[str, float]:
    return {
        "frontier": frontier(
            lambda rate: trial(cell.config, data=cell.data, rate=rate, heldout=False), EIGHTHS
        )
    }


def finer(study: Study) -> Study:
    """The study of frontiers on the grid of eighths, on fresh seeds; the caller replaces its question."""
    return replace(
        study,
        name=f"{study.name}-fine",
        first=201,
        seeds=24,
        measure=measure,
        outcomes={"frontier": Outcome(title="Largest rate survived, log2", margin=0.5, unit="octaves")},
    )


STUDY = replace(
    finer(embedding_norm.STUDY),
    question="Does a norm after the embedding raise the rate that a pre-LN model survives in fp16, by eighths of an octave?",
    claims=embedding_norm.STUDY.claims[:1],
    predictions=(
        "2026-11-29, before the runs, after those of embedding-norm: a gain of .1 to .2 octaves, so equivalent within half an "
        "octave.",
    ),
)

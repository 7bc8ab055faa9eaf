"""C3, second half, on a grid of eighths of an octave: ``egs-frontier`` asks in steps as large as its smallest effect of interest.

There, after 24 seeds, three of four pairs of arms differed by one step up in some seeds and down in others: neither distinguishable
from no effect nor shown to be below the margin. The grid is that of ``embedding-norm-fine``, from 2^-3.5 to 2^-.5, which covers all
frontiers seen there. Seeds are fresh.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.suites import egs_frontier
from experiments.suites.embedding_norm_fine import finer

STUDY = replace(
    finer(egs_frontier.STUDY),
    question="Does shrinking the embedding's gradient raise the rate that a model bears, by eighths of an octave?",
    predictions=(
        "2026-11-29, before the runs, after those of egs-frontier: equivalent within half an octave in all four; tied and "
        "unclipped a tenth up, clipped at .1 and untied a tenth down.",
    ),
)

"""Each remedy alone, in fp16, where a run ends with an overflow; see ``_remedies``."""

from __future__ import annotations

from functools import partial

from experiments.study import Study
from experiments.suites._proxy import proxy_text
from experiments.suites._remedies import ARMS, OUTCOMES, SETTINGS, claims, measure_over, quarters

STUDY = Study(
    name="remedies-fp16",
    question="Which remedy alone raises the rate that an unstable model survives in fp16, and what does it cost?",
    arms=ARMS,
    seeds=8,
    settings={**SETTINGS, "precision": "fp16"},
    data=proxy_text,
    measure=partial(measure_over, quarters(-5, 1)),
    outcomes=OUTCOMES,
    claims=claims("fp16"),
    predictions=(
        "2026-11-29, before the runs (two seeds of a former design were seen, in which nothing gained an octave): DeepNorm, "
        "sandwich, reordered norm and QK-norm raise the frontier by half an octave or more; z-loss, beta2, sinks and guards do "
        "not move it; EGS neither, since Adam divides it out; a longer warm-up does.",
        "The least held-out loss is Muon's. 4-bit loss follows the outliers: sandwich and reordered norm lower both.",
    ),
)

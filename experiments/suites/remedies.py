"""Each remedy alone, in fp32, where a run ends with a loss that does not come back; see ``_remedies``."""

from __future__ import annotations

from functools import partial

from experiments.study import Study
from experiments.suites._proxy import proxy_text
from experiments.suites._remedies import ARMS, OUTCOMES, SETTINGS, claims, measure_over, quarters

STUDY = Study(
    name="remedies",
    question="Which remedy alone raises the rate that an unstable model survives, and what does it cost?",
    arms=ARMS,
    seeds=8,
    settings={**SETTINGS, "precision": "fp32"},
    data=proxy_text,
    measure=partial(measure_over, quarters(-3, 3)),
    outcomes=OUTCOMES,
    claims=claims("fp32"),
    predictions=(
        "2026-11-29, before the runs: without fp16's range the frontier lies higher and remedies of the scores move it less; "
        "what bounds the update (Muon, StableAdamW, longer warm-up) moves it most.",
    ),
)

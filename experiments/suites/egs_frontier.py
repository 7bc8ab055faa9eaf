"""C3, second half. The largest rate that survives with and without EGS, by clip, tied and untied; see ``egs``."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import PROXY, proxy_text
from experiments.suites.egs import CLIPS, KINDS
from experiments.trial import frontier, trial
from experiments.verdicts import Claim


def measure(cell: Cell) -> Mapping[str, float]:
    return {"frontier": frontier(lambda rate: trial(cell.config, data=cell.data, rate=rate, heldout=False))}


ACTING = [name for name in CLIPS if name != "clip1"]

STUDY = Study(
    name="egs-frontier",
    question="Does shrinking the embedding's gradient raise the rate that a model bears?",
    arms=tuple(
        Arm(
            name=f"{kind}-{name}-{dose}",
            summary=f"{kind}, clip {CLIPS[name]}, alpha {dose}",
            settings={**settings, "optimizer.clip": CLIPS[name], "model.embedding.gradient-shrink": dose},
        )
        for kind, settings in KINDS.items()
        for name in ACTING
        for dose in ("1", "0.1")
    ),
    seeds=12,
    settings={**PROXY, "precision": "fp16", "model.norm": "deepnorm"},
    data=proxy_text,
    measure=measure,
    outcomes={
        "frontier": Outcome(title="Largest rate survived, log2", margin=0.5, unit="octaves", scale="rank")
    },
    claims=tuple(
        Claim(
            text=f"C3 EGS (alpha .1) raises the rate that is survived, {kind}, {name}",
            metric="frontier",
            arm=f"{kind}-{name}-0.1",
            baseline=f"{kind}-{name}-1",
            direction="more",
        )
        for kind in KINDS
        for name in ACTING
    ),
    predictions=(
        "2026-11-29, before the runs (seed 0 was seen): within half an octave without clip; with it open.",
    ),
)

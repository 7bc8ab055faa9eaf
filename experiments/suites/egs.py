"""C3. Embedding-gradient shrink x clipping, tied and untied, in four doses.

Adam cancels a constant factor on a gradient, but for epsilon and fp16's range: so EGS can act only through the global clip, where a
smaller share of the embedding leaves more of the budget to the other layers. Earlier suites judged it with clipping off. This study
compares the held-out loss at rate 2^-8, ``egs-frontier`` the largest rate that survives. EGS shrinks the gradient on both sides of
a tied matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import PROXY, proxy_text
from experiments.trial import trial
from experiments.verdicts import Claim

RATE = 2.0**-8
DOSES = ("1", "0.5", "0.1", "0")
KINDS = {"tied": {"model.embedding.shrink-side": "both"}, "untied": {"model.embedding.no-tied": ""}}
# A clip of 1 never acts on this model, whose norm is about .6; one of .1 always does, and is where an effect could be.
CLIPS = {"clip1": "1", "clip01": "0.1", "unclipped": "0"}


def measure(cell: Cell) -> Mapping[str, float]:
    run = trial(cell.config, data=cell.data, rate=RATE)
    return {
        "heldout": run.heldout,
        "norm": math.exp(sum(map(math.log, run.norm[20:])) / len(run.norm[20:])),
    }


STUDY = Study(
    name="egs",
    question="Does shrinking the embedding's gradient change what a model learns, and only through clipping?",
    arms=tuple(
        Arm(
            name=f"{kind}-{name}-{dose}",
            summary=f"{kind}, clip {clip}, alpha {dose}",
            settings={**settings, "optimizer.clip": clip, "model.embedding.gradient-shrink": dose},
        )
        for kind, settings in KINDS.items()
        for name, clip in CLIPS.items()
        for dose in DOSES
    ),
    seeds=8,
    settings={**PROXY, "precision": "fp16", "model.norm": "deepnorm"},
    data=proxy_text,
    measure=measure,
    outcomes={
        "heldout": Outcome(title="Held-out loss", margin=0.02, unit="nats"),
    },
    claims=tuple(
        Claim(
            text=f"C3 EGS (alpha {dose}) {words}, {kind}, {name}",
            metric=metric,
            arm=f"{kind}-{name}-{dose}",
            baseline=f"{kind}-{name}-1",
            direction=direction,  # type: ignore[arg-type]
        )
        for kind in KINDS
        for name in CLIPS
        for metric, dose, words, direction in (
            ("heldout", "0.1", "lowers the held-out loss", "less"),
            ("heldout", "0.5", "lowers the held-out loss", "less"),
            # An embedding that its look-up and its output never move: the end of the dose's scale.
            ("heldout", "0", "costs held-out loss", "more"),
        )
    ),
    predictions=(
        "2026-11-29, before the runs (seed 0 was seen): no effect without clip: alpha .5 and .1 are equivalent to 1 in frontier "
        "and loss, tied and untied. "
        "A clip of 1 never acts here. With clip .1 an effect is possible. Alpha 0 costs loss everywhere.",
    ),
)

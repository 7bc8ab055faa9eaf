"""A rate that the model cannot bear: does the gradient norm break out before the loss does, and is it the embedding's doing?

GLM-130B saw its training collapse a few steps after spikes of the gradient norm, and found abnormal gradients of the
embedding in them; shrinking that gradient (EGS) was the cure. Here the rate jumps over what the model bears.
"""

from __future__ import annotations

from experiments.arm import Arm, Suite
from experiments.data import bilingual
from experiments.verdicts import Claim

SHRUNK = {"model.embedding.gradient-shrink": "0.1"}
NORMS = {"pre": "pre-LN", "deepnorm": "DeepNorm"}

SUITE = Suite(
    name="collapse",
    question=(
        "When a run collapses, does its gradient norm say so first, is the embedding's share of it larger then, and does "
        "shrinking the embedding's gradient keep the run on its course?"
    ),
    preset="glm-tiny",
    steps=240,
    seeds=(0, 1, 2, 3),
    settings={
        "model.layers": "4",
        "model.hidden": "64",
        "model.length": "128",
        "batch.rows": "8",
        "precision": "fp16",
        "schedule.peak": "3e-1",
        "schedule.warmup": "120",
        "optimizer.clip": "0",
        "monitor.every": "20",
    },
    arms=tuple(
        Arm(name=f"{norm}{name}", summary=f"{said}{words}", settings={"model.norm": norm, **settings})
        for norm, said in NORMS.items()
        for name, words, settings in (
            ("", "", {}),
            ("-egs", ", EGS 0.1", SHRUNK),
            ("-egs-both", ", EGS 0.1 on both sides", {**SHRUNK, "model.embedding.shrink-side": "both"}),
        )
    ),
    claims=tuple(
        Claim(
            text=f"{text}, {said}", metric=metric, arm=f"{norm}{name}", baseline=baseline, direction=direction
        )
        for norm, said in NORMS.items()
        for text, metric, name, baseline, direction in (
            ("The gradient norm breaks out before the loss", "norm_lead", "", None, "more"),
            ("The embedding's share of the gradient is larger then", "embedding_surge", "", None, "more"),
            ("EGS ends with a lower loss", "final_loss", "-egs", norm, "less"),
            ("EGS on both sides ends with a lower loss", "final_loss", "-egs-both", norm, "less"),
        )
    ),
    data=bilingual,
)

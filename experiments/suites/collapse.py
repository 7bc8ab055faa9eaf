"""A rate that the model cannot bear: does the gradient norm break out before the loss does, and is the embedding the cause?

GLM-130B saw its training collapse a few steps after spikes of the gradient norm, and found abnormal gradients of the embedding in
them; shrinking that gradient (EGS) was the cure. Here the rate climbs past what the model bears.
"""

from __future__ import annotations

from experiments.arm import Arm, Suite
from experiments.data import bilingual
from experiments.verdicts import Claim

SHRUNK = {"model.embedding.gradient-shrink": "0.1", "model.embedding.shrink-side": "both"}
NORMS = {"pre": "pre-LN", "deepnorm": "DeepNorm"}

PRECISIONS = ("fp16", "fp32")

SUITE = Suite(
    name="collapse",
    question=(
        "When a run collapses, does its gradient norm say so first, is the embedding's share of it larger then, and does "
        "shrinking the embedding's gradient keep the run on its course for longer?"
    ),
    preset="glm-tiny",
    steps=160,
    seeds=(0, 1, 2),
    settings={
        "model.layers": "4",
        "model.hidden": "64",
        "model.length": "128",
        "batch.rows": "8",
        "schedule.peak": "4e-1",
        "schedule.warmup": "160",
        "optimizer.clip": "0",
        "monitor.every": "20",
    },
    arms=tuple(
        Arm(
            name=f"{norm}-{precision}{name}",
            summary=f"{said}, {precision}{words}",
            settings={"model.norm": norm, "precision": precision, **settings},
        )
        for norm, said in NORMS.items()
        for precision in PRECISIONS
        for name, words, settings in (("", "", {}), ("-egs", ", EGS 0.1 on both sides", SHRUNK))
    ),
    claims=tuple(
        claim
        for norm, said in NORMS.items()
        for precision in PRECISIONS
        for claim in (
            Claim(
                text=f"The gradient norm breaks out before the loss does, {said}, {precision}",
                metric="norm_lead",
                arm=f"{norm}-{precision}",
                baseline=None,
                direction="more",
            ),
            Claim(
                text=f"The embedding's share of the gradient is larger then, {said}, {precision}",
                metric="embedding_surge",
                arm=f"{norm}-{precision}",
                baseline=None,
                direction="more",
            ),
            Claim(
                text=f"EGS survives longer, {said}, {precision}",
                metric="survived",
                arm=f"{norm}-{precision}-egs",
                baseline=f"{norm}-{precision}",
                direction="more",
            ),
        )
    ),
    data=bilingual,
)

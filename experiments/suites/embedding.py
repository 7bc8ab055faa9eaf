"""The embedding's gradient: does shrinking it calm a run, and on which side?

With tied matrices the embedding gets two gradients, from the look-up and from the output projection. GLM-130B shrank the first
(EGS, alpha 0.1). Adam divides by the gradient's own scale, so that a constant factor changes an update only through clipping and
epsilon: what EGS can do, it does through the global norm.
"""

from __future__ import annotations

from experiments.arm import Arm, Suite
from experiments.data import bilingual
from experiments.verdicts import Claim

SHRUNK = {"model.embedding.gradient-shrink": "0.1"}
SIDES = (("input", "egs"), ("output", "egs-output"), ("both", "egs-both"))

SUITE = Suite(
    name="embedding",
    question=(
        "Does EGS lower the gradient norm and its variance, when the look-up's gradient is shrunk, the output projection's, "
        "or both; does untying the two change the answer; and what does BLOOM's embedding norm do in its place?"
    ),
    preset="glm-tiny",
    steps=200,
    seeds=(0, 1),
    settings={
        "model.hidden": "64",
        "model.length": "128",
        "batch.rows": "8",
        "schedule.peak": "3e-3",
        "schedule.warmup": "30",
        "monitor.every": "10",
    },
    arms=(
        Arm(name="plain", summary="tied, nothing shrunk"),
        *(
            Arm(
                name=name,
                summary=f"tied, x 0.1 on the {side}",
                settings={**SHRUNK, "model.embedding.shrink-side": side},
            )
            for side, name in SIDES
        ),
        Arm(name="untied", summary="two matrices", settings={"model.embedding.no-tied": ""}),
        Arm(
            name="untied-egs",
            summary="two matrices, the look-up's x 0.1",
            settings={**SHRUNK, "model.embedding.no-tied": ""},
        ),
        Arm(name="norm", summary="tied, norm after the look-up", settings={"model.embedding.norm": ""}),
    ),
    claims=(
        *(
            Claim(text=f"{text}, shrunk on the {side}", metric=metric, arm=arm, baseline="plain")
            for text, metric in (
                ("EGS reduces the largest gradient norm", "gradient_norm_max"),
                ("EGS reduces the gradient norm's variance", "gradient_norm_spread"),
            )
            for side, arm in SIDES
        ),
        Claim(
            text="EGS reduces the largest gradient norm, untied",
            metric="gradient_norm_max",
            arm="untied-egs",
            baseline="untied",
        ),
        Claim(
            text="EGS costs no loss, shrunk on both",
            metric="final_loss",
            arm="egs-both",
            baseline="plain",
        ),
        Claim(
            text="An embedding norm reduces the largest gradient norm",
            metric="gradient_norm_max",
            arm="norm",
            baseline="plain",
            source="BLOOM (2211.05100)",
        ),
    ),
    data=bilingual,
)

"""Where the norms stand, in a deep and narrow model: how large does the residual stream become towards the last layer?

GLM-130B chose DeepNorm since pre-LN's residual stream grows extreme in deep layers and Sandwich-LN collapsed. Here: 24 layers at a
rate five times that of the quick suite, on the same batches for all arms.
"""

from __future__ import annotations

from experiments.arm import Arm, Suite
from experiments.data import bilingual
from experiments.verdicts import Claim

NORMS = {
    "pre": "norm before each sublayer (GPT-2)",
    "post": "norm after each sum (the first transformer)",
    "sandwich": "norms before and after each sublayer (CogView)",
    "deepnorm": "GLM-130B's DeepNorm, alpha (2L)^0.5",
    "deepnet": "DeepNet's own constants, alpha (2L)^0.25",
}

SUITE = Suite(
    name="depth",
    question="Whose residual stream grows with depth, 24 layers deep, and which norm trains best there?",
    preset="glm-tiny",
    steps=150,
    seeds=(0, 1),
    settings={
        "model.layers": "24",
        "model.hidden": "64",
        "model.length": "128",
        "batch.rows": "4",
        "schedule.peak": "1e-2",
        "schedule.warmup": "30",
        "monitor.every": "5",
    },
    arms=tuple(
        Arm(name=norm, summary=summary, settings={"model.norm": norm}) for norm, summary in NORMS.items()
    ),
    claims=(
        Claim(
            text="DeepNorm keeps the residual stream bounded where pre-LN lets it grow",
            metric="residual_stream_max",
            arm="deepnorm",
            baseline="pre",
        ),
        Claim(
            text="From first layer to last, DeepNorm's residual stream grows less than pre-LN's",
            metric="residual_stream_growth",
            arm="deepnorm",
            baseline="pre",
        ),
        Claim(
            text="DeepNorm trains to a lower loss than pre-LN",
            metric="final_loss",
            arm="deepnorm",
            baseline="pre",
        ),
        Claim(
            text="DeepNorm trains to a lower loss than post-LN",
            metric="final_loss",
            arm="deepnorm",
            baseline="post",
        ),
        Claim(
            text="DeepNorm trains to a lower loss than Sandwich-LN",
            metric="final_loss",
            arm="deepnorm",
            baseline="sandwich",
        ),
        Claim(
            text="GLM's constants train to a lower loss than DeepNet's",
            metric="final_loss",
            arm="deepnorm",
            baseline="deepnet",
        ),
    ),
    data=bilingual,
)

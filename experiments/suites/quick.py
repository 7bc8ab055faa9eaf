"""Four ways to keep a small GLM stable in fp16, on real bilingual text: what does each change, in ten minutes?

The seed of the project says: pre-LN lets the residual stream grow without bound in deep layers; DeepNorm (post-LN) bounds it;
spikes come with abnormal gradients of the embedding, and shrinking that gradient (EGS) removes them; BLOOM's embedding norm
stabilises too. At this size nothing need collapse; the suite shows how large the residual stream, the attention scores and the
embedding's gradient become, and what each way costs in loss.
"""

from __future__ import annotations

from experiments.arm import Arm, Suite
from experiments.data import bilingual
from experiments.verdicts import Claim

SUITE = Suite(
    name="quick",
    question=(
        "Does DeepNorm bound the residual stream where pre-LN lets it grow, does shrinking the embedding's gradient (EGS, "
        "alpha 0.1) calm the gradient norm, does an embedding norm help pre-LN, and what does each cost in loss? "
        "All arms train in fp16 with fp32 masters on the same batches in the same order."
    ),
    preset="glm-tiny",
    # Four seeds are the fewest that decide anything; two cores make these sixteen runs in some five minutes.
    steps=100,
    seeds=(0, 1, 2, 3),
    settings={
        "precision": "fp16",
        "batch.rows": "4",
        "schedule.peak": "2e-3",
        "monitor.every": "5",
        "checkpoint.every": "100",
        "loss-scale.window": "50",
    },
    arms=(
        Arm(name="pre-ln", summary="norm before each sublayer", settings={"model.norm": "pre"}),
        Arm(
            name="deepnorm",
            summary="GLM-130B's DeepNorm, alpha (2L)^0.5",
            settings={"model.norm": "deepnorm"},
        ),
        Arm(
            name="deepnorm-egs",
            summary="DeepNorm, embedding gradient x 0.1",
            settings={"model.norm": "deepnorm", "model.embedding.gradient-shrink": "0.1"},
        ),
        Arm(
            name="pre-ln-embedding-norm",
            summary="pre-LN, norm after the embedding look-up",
            settings={"model.norm": "pre", "model.embedding.norm": ""},
        ),
    ),
    claims=(
        Claim(
            text="DeepNorm keeps the residual stream bounded where pre-LN lets it grow",
            metric="residual_stream_max",
            arm="deepnorm",
            baseline="pre-ln",
        ),
        Claim(
            text="DeepNorm leaves more of fp16's range unused than pre-LN",
            metric="fp16_headroom",
            arm="deepnorm",
            baseline="pre-ln",
            direction="more",
        ),
        Claim(
            text="EGS reduces the largest gradient norm",
            metric="gradient_norm_max",
            arm="deepnorm-egs",
            baseline="deepnorm",
        ),
        Claim(
            text="EGS reduces the embedding's share of the gradient",
            metric="embedding_share",
            arm="deepnorm-egs",
            baseline="deepnorm",
        ),
        Claim(
            text="EGS costs no loss",
            metric="final_loss",
            arm="deepnorm-egs",
            baseline="deepnorm",
        ),
        Claim(
            text="An embedding norm reduces the largest gradient norm of pre-LN",
            metric="gradient_norm_max",
            arm="pre-ln-embedding-norm",
            baseline="pre-ln",
            source="BLOOM (2211.05100)",
        ),
        Claim(
            text="DeepNorm trains to a lower loss than pre-LN",
            metric="final_loss",
            arm="deepnorm",
            baseline="pre-ln",
        ),
    ),
    data=bilingual,
)

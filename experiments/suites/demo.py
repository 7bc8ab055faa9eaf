"""What ``make demo`` asks: which learning rate does each recipe survive, what breaks first, and what holds?

A model of 4 layers of 64 meets at high rates what GLM-130B met at scale: in fp16 an activation passes 65,504, the loss becomes NaN,
the loss scale falls to its minimum. Five recipes run at three rates with ten seeds: enough for a difference that all seeds show to
hold among six claims. A lost run ends early. Between the second and the third rate fp16 reaches its limit: at 2^-2 most seeds
break, at 2^-1 all. Two of the recipes are cures: BF16, which has fp32's range, and a responder that goes back to the
state before the break and halves the rate. EGS shrinks the embedding's gradient to a tenth.

Two cores get through these seeds and rates in some four minutes.
"""

from __future__ import annotations

from experiments.arm import Arm, Suite
from experiments.suites._proxy import proxy_text
from experiments.verdicts import Claim

FP16 = {"precision": "fp16", "loss-scale.window": "50"}

SUITE = Suite(
    name="demo",
    question=(
        "Which learning rate does each recipe survive, what breaks first, and which cure holds? All arms train the same small "
        "GLM on the same batches, from the same initial weights as far as shapes agree."
    ),
    preset="glm-proxy",
    steps=80,
    seeds=tuple(range(10)),
    rates=(-6, -4, -1),
    settings={
        "model.length": "64",
        "batch.rows": "8",
        "objective.pieces": "2",
        "objective.multitask-share": "0",
        "schedule.warmup": "30",
        "monitor.every": "10",
        "checkpoint.every": "0",
        "checkpoint.ring": "0",
        "stop-when-lost": "10",
    },
    arms=(
        Arm(
            name="pre-ln",
            summary="norm before each sublayer, fp16",
            settings={"model.norm": "pre", **FP16},
        ),
        Arm(
            name="deepnorm",
            summary="GLM-130B's DeepNorm, fp16",
            settings={"model.norm": "deepnorm", **FP16},
        ),
        Arm(
            name="deepnorm-egs",
            summary="DeepNorm, fp16, embedding gradient x 0.1",
            settings={
                "model.norm": "deepnorm",
                **FP16,
                "model.embedding.gradient-shrink": "0.1",
            },
        ),
        Arm(
            name="deepnorm-bf16",
            summary="DeepNorm in bf16 (a cure: fp32's range)",
            settings={"model.norm": "deepnorm", "precision": "bf16"},
        ),
        Arm(
            name="deepnorm-responder",
            summary="DeepNorm, fp16, goes back at a break and halves the rate (a cure)",
            settings={"model.norm": "deepnorm", **FP16, "responder.policy": "lower-rate"},
        ),
    ),
    claims=(
        Claim(
            text="BF16 survives a higher rate than FP16",
            metric="frontier",
            arm="deepnorm-bf16",
            baseline="deepnorm",
            direction="more",
        ),
        Claim(
            text="Going back and halving the rate survives where FP16 alone breaks",
            metric="frontier",
            arm="deepnorm-responder",
            baseline="deepnorm",
            direction="more",
            source="OPT (2205.01068), section 2.5",
        ),
        Claim(
            text="Shrinking the embedding's gradient (EGS) raises the rate that is survived",
            metric="frontier",
            arm="deepnorm-egs",
            baseline="deepnorm",
            direction="more",
        ),
        Claim(
            text="DeepNorm survives a higher rate than pre-LN",
            metric="frontier",
            arm="deepnorm",
            baseline="pre-ln",
            direction="more",
        ),
        Claim(
            text="DeepNorm trains to a lower loss than pre-LN",
            metric="final_loss",
            arm="deepnorm",
            baseline="pre-ln",
        ),
        Claim(
            text="BF16 costs loss",
            metric="final_loss",
            arm="deepnorm-bf16",
            baseline="deepnorm",
            direction="more",
            source="the format has 8 bits of precision, FP16 has 11",
        ),
    ),
    data=proxy_text,
)

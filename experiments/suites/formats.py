"""FP16 against BF16 against FP32 while the learning rate climbs: which run leaves its format, and does the norm decide it?

GLM-130B says that FP16 overflows where the residual stream of pre-LN grows, that DeepNorm keeps it in range, and that BF16 has the
range to go on. The suite trains the same model at two rates, at the second of which no precision learns well.
"""

from __future__ import annotations

from experiments.arm import Arm, Suite
from experiments.data import bilingual
from experiments.verdicts import Claim

RATES = ("1e-2", "3e-1")
NORMS = {"pre": "pre-LN", "deepnorm": "DeepNorm"}
FORMATS = ("fp32", "bf16", "fp16")

SUITE = Suite(
    name="formats",
    question=(
        "At which learning rate does fp16 stop where fp32 and bf16 go on, and does DeepNorm move that rate? "
        "Half formats have fp32 masters; fp16 has a dynamic loss scale."
    ),
    preset="glm-tiny",
    steps=120,
    seeds=(0, 1),
    settings={
        "model.hidden": "64",
        "model.length": "128",
        "batch.rows": "8",
        "schedule.warmup": "30",
        "monitor.every": "5",
    },
    arms=tuple(
        Arm(
            name=f"{norm}-{precision}-{rate}",
            summary=f"{said}, {precision}, rate {rate}",
            settings={
                "model.norm": norm,
                "precision": precision,
                "schedule.peak": rate,
                **({"loss-scale.window": "50"} if precision == "fp16" else {}),
            },
        )
        for rate in RATES
        for norm, said in NORMS.items()
        for precision in FORMATS
    ),
    claims=(
        *(
            Claim(
                text=f"BF16 skips fewer updates than FP16, {said}, rate {rate}",
                metric="skipped_steps",
                arm=f"{norm}-bf16-{rate}",
                baseline=f"{norm}-fp16-{rate}",
            )
            for rate in RATES
            for norm, said in NORMS.items()
        ),
        *(
            Claim(
                text=f"In FP16, DeepNorm skips fewer updates than pre-LN, rate {rate}",
                metric="skipped_steps",
                arm=f"deepnorm-fp16-{rate}",
                baseline=f"pre-fp16-{rate}",
            )
            for rate in RATES
        ),
        *(
            Claim(
                text=f"DeepNorm leaves more of fp16's range unused (measured in fp32), rate {rate}",
                metric="fp16_headroom",
                arm=f"deepnorm-fp32-{rate}",
                baseline=f"pre-fp32-{rate}",
                direction="more",
            )
            for rate in RATES
        ),
    ),
    data=bilingual,
)

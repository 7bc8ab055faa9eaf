"""GLM-130B's ladder of architecture choices: learned positions, ALiBi, RoPE, RoPE with GeGLU.

The paper trained 110M models and measured test perplexity: 24.58 (base), 24.14 (ALiBi), 22.95 (RoPE), 22.31 (RoPE and GeGLU). Here
the same ladder at 1.9M parameters, each row seen once, so that the loss of the last steps is a test loss.
"""

from __future__ import annotations

from experiments.arm import Arm, Suite
from experiments.data import bilingual
from experiments.verdicts import Claim

GELU = {"model.feed-forward.kind": "gelu"}

SUITE = Suite(
    name="positions",
    question="Does each rung of GLM-130B's ladder (learned positions, ALiBi, RoPE, RoPE and GeGLU) lower the loss?",
    preset="glm-tiny",
    steps=300,
    seeds=(0, 1),
    settings={
        "model.norm": "pre",
        "model.init": "gpt2",
        "model.length": "128",
        "batch.rows": "8",
        "schedule.peak": "3e-3",
        "schedule.warmup": "30",
        "monitor.every": "50",
    },
    arms=(
        Arm(
            name="learned",
            summary="learned positions, GELU",
            settings={**GELU, "model.attention.positions": "learned"},
        ),
        Arm(name="alibi", summary="ALiBi, GELU", settings={**GELU, "model.attention.positions": "alibi"}),
        Arm(name="rope", summary="RoPE, GELU", settings=GELU),
        Arm(name="rope-geglu", summary="RoPE, GeGLU"),
    ),
    claims=(
        Claim(
            text="ALiBi is better than learned positions",
            metric="final_loss",
            arm="alibi",
            baseline="learned",
        ),
        Claim(text="RoPE is better than ALiBi", metric="final_loss", arm="rope", baseline="alibi"),
        Claim(text="GeGLU is better than GELU", metric="final_loss", arm="rope-geglu", baseline="rope"),
        Claim(
            text="RoPE and GeGLU are better than learned positions and GELU",
            metric="final_loss",
            arm="rope-geglu",
            baseline="learned",
        ),
    ),
    data=bilingual,
)

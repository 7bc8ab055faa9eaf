"""A head-to-head of one's own: does a gated feed-forward layer train to a lower loss than a plain one?

python -m experiments run examples/own_suite.py --until-decided --budget 2h
"""

from experiments.arm import Arm, Suite
from experiments.data import bilingual
from experiments.verdicts import Claim

SUITE = Suite(
    name="gated",
    question="Does a gated feed-forward layer train to a lower loss than a plain one?",
    preset="glm-proxy",
    steps=200,
    seeds=(0, 1, 2, 3),
    settings={"monitor.every": "10"},
    arms=(
        Arm(name="gelu", summary="plain", settings={"model.feed-forward.kind": "gelu"}),
        Arm(name="geglu", summary="gated", settings={"model.feed-forward.kind": "geglu"}),
    ),
    claims=(
        Claim(
            text="GeGLU trains to a lower loss than GELU",
            metric="final_loss",
            arm="geglu",
            baseline="gelu",
            source="2002.05202",
            prediction="supported, by about .02 nats",
        ),
    ),
    data=bilingual,
)

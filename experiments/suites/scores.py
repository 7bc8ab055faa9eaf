"""C5. Scores beyond fp16: does PB-Relax cure the overflow, and does it cure the divergence?

Two separate questions. *Overflow*: the study multiplies queries and keys of a fresh model by ``GAIN`` each, so that scores pass
65,504; is the first loss finite? *Divergence*: the largest rate that survives, in fp16, from ordinary initial weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import PROXY, proxy_text
from experiments.trial import frontier, trial
from experiments.verdicts import Claim
from glm.train.engine import LocalEngine
from glm.train.loop import Trainer

GAIN = 300.0


@torch.no_grad()
def enlarge(trainer: Trainer) -> None:
    """Multiply queries and keys of the first layer by ``GAIN``."""
    assert isinstance(trainer.engine, LocalEngine)
    weight = trainer.engine.optimizer.masters()["layers.0.attention.query_key_value.weight"]
    q, k, _ = weight.chunk(3)
    q *= GAIN
    k *= GAIN
    trainer.engine.optimizer.publish()


def measure(cell: Cell) -> Mapping[str, float]:
    planted = trial(cell.config, data=cell.data, rate=2.0**-8, until=1, heldout=False, prepare=enlarge)
    values = {"overflowed": float(not math.isfinite(planted.loss[0]))}
    if cell.arm.name in ("compute", "pb-relax"):
        values["frontier"] = frontier(
            lambda rate: trial(cell.config, data=cell.data, rate=rate, heldout=False)
        )
    return values


STUDY = Study(
    name="scores",
    question="Where attention scores leave fp16's range, what does PB-Relax cure?",
    arms=(
        Arm(
            name="compute",
            summary="scores and softmax in fp16",
            settings={"model.attention.softmax": "compute"},
        ),
        Arm(
            name="pb-relax",
            summary="CogView's relaxation, a = 32",
            settings={"model.attention.softmax": "pb-relax"},
        ),
        Arm(
            name="fp32",
            summary="GLM-130B's scaling and fp32 softmax",
            settings={"model.attention.softmax": "fp32"},
        ),
        Arm(
            name="qk-norm",
            summary="scores in fp16, QK-norm",
            settings={"model.attention.softmax": "compute", "model.attention.qk-norm": ""},
        ),
    ),
    seeds=12,
    settings={**PROXY, "precision": "fp16", "model.norm": "pre"},
    data=proxy_text,
    measure=measure,
    outcomes={
        "overflowed": Outcome(title="The first loss overflows, scores beyond fp16", margin=0.2),
        "frontier": Outcome(title="Largest rate survived, log2", margin=0.5, unit="octaves", scale="rank"),
    },
    claims=(
        Claim(
            text="C5 PB-Relax cures the scores' overflow",
            metric="overflowed",
            arm="pb-relax",
            baseline="compute",
        ),
        Claim(
            text="C5 PB-Relax raises the rate that is survived",
            metric="frontier",
            arm="pb-relax",
            baseline="compute",
            direction="more",
        ),
        Claim(
            text="C5 GLM-130B's scaling with an fp32 softmax cures the first layer's overflow",
            metric="overflowed",
            arm="fp32",
            baseline="compute",
        ),
    ),
    predictions=(
        "2026-11-29, before the runs (seed 0 was seen): the overflow is cured by PB-Relax in every run; the frontier stays, within "
        "half an octave. The fp32 softmax does not cure it in layer 0, whose divisor is 1.",
    ),
)

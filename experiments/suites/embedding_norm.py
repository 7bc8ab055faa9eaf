"""C7, first half. BLOOM's embedding norm: the largest rate that pre-LN survives, and the loss at a rate that both arms survive."""

from __future__ import annotations

from experiments.arm import Arm
from experiments.study import Outcome, Study
from experiments.suites._proxy import PROXY, proxy_text
from experiments.suites.survival import measure
from experiments.verdicts import Claim

STUDY = Study(
    name="embedding-norm",
    question="Does a norm after the embedding raise the rate that a pre-LN model survives in fp16, and what does it cost?",
    arms=(
        Arm(name="plain", summary="pre-LN"),
        Arm(name="norm", summary="pre-LN, embedding norm", settings={"model.embedding.norm": ""}),
    ),
    seeds=12,
    settings={**PROXY, "precision": "fp16", "model.norm": "pre"},
    data=proxy_text,
    measure=measure,
    outcomes={
        "frontier": Outcome(title="Largest rate survived, log2", margin=0.5, unit="octaves", scale="rank"),
        "heldout": Outcome(title="Held-out loss at rate 2^-7", margin=0.02, unit="nats"),
    },
    claims=(
        Claim(
            text="C7 An embedding norm raises the rate that is survived",
            metric="frontier",
            arm="norm",
            baseline="plain",
            direction="more",
            source="BLOOM (2211.05100)",
        ),
        Claim(
            text="C7 An embedding norm lowers the loss early in training",
            metric="heldout",
            arm="norm",
            baseline="plain",
        ),
    ),
    predictions=("2026-11-29, before the runs: the frontier rises; the loss is lower at this size.",),
)

"""A run that breaks by itself, and what each of the responder's policies makes of it.

The learning rate climbs for 300 steps to a hundred times what this model bears, unclipped. Somewhere on the way every run
leaves its course: in fp32 the loss climbs for good, in fp16 the numbers leave the format, the loss scale falls to 1 and no
update is made any more. Each policy starts from the same weights and sees the same batches until its first decision.
"""

from __future__ import annotations

from experiments.arm import Arm, Suite
from experiments.data import bilingual
from experiments.verdicts import Claim

SOURCE = "OPT-175B (2205.01068), PaLM (2204.02311)"

SUITE = Suite(
    name="responder",
    question=(
        "A run whose learning rate grows past what it bears diverges. Does it end when a responder lowers the rate, clips "
        "tighter, goes back and leaves batches out, or tries these one after the other?"
    ),
    preset="gpt3-like",
    steps=400,
    seeds=(0, 1, 2),
    settings={
        "model.layers": "4",
        "model.hidden": "64",
        "model.length": "128",
        "schedule.peak": "1.0",
        "schedule.warmup": "300",
        "schedule.shape": "constant",
        "optimizer.clip": "0",
        "monitor.every": "10",
        "responder.rate-factor": "0.3",
        "responder.rollback-steps": "40",
        "responder.skip-batches": "20",
    },
    arms=(
        Arm(name="none", summary="no responder, fp32"),
        Arm(
            name="lower-rate",
            summary="rate x 0.3 at each episode",
            settings={"responder.policy": "lower-rate"},
        ),
        Arm(
            name="clip",
            summary="clip at 0.3 from the first episode on",
            settings={"responder.policy": "clip"},
        ),
        Arm(
            name="roll-back",
            summary="back 40 steps, 20 batches left out",
            settings={"responder.policy": "roll-back"},
        ),
        Arm(
            name="escalate",
            summary="skip, clip, lower the rate, roll back",
            settings={"responder.policy": "escalate"},
        ),
        Arm(name="fp16-none", summary="no responder, fp16", settings={"precision": "fp16"}),
        Arm(
            name="fp16-lower-rate",
            summary="fp16, rate x 0.3 at each episode",
            settings={"precision": "fp16", "responder.policy": "lower-rate"},
        ),
    ),
    claims=(
        Claim(
            text="Lowering the rate ends a run that diverges without it",
            metric="final_loss",
            arm="lower-rate",
            baseline="none",
            source=SOURCE,
        ),
        Claim(
            text="Clipping tighter does",
            metric="final_loss",
            arm="clip",
            baseline="none",
            source=SOURCE,
        ),
        Claim(
            text="Going back and leaving batches out does",
            metric="final_loss",
            arm="roll-back",
            baseline="none",
            source=SOURCE,
        ),
        Claim(
            text="Escalating does",
            metric="final_loss",
            arm="escalate",
            baseline="none",
            source=SOURCE,
        ),
        Claim(
            text="Lowering the rate saves an fp16 run whose loss scale collapses",
            metric="skipped_steps",
            arm="fp16-lower-rate",
            baseline="fp16-none",
            source=SOURCE,
        ),
    ),
    data=bilingual,
)

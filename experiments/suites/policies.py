"""C8. OPT's way, PaLM's way and the responder's policies, each from the same state 16 steps before a collapse.

    OPT     leave batches out, halve the rate, clip at .3                                 (2205.01068, section 2.5)
    PaLM    go back, and leave out the batches around the spike                           (2204.02311, section 5.1)

A policy *averts* the collapse if none comes until 25 steps after the original's. Here the cause is a rate that climbs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._collapse import CLIMB, WATCHED, collapsing, comes_again
from experiments.suites._proxy import proxy_text
from experiments.verdicts import Claim
from glm.train.intervention import Intervention

BEFORE, LATER, LEFT_OUT = 16, 15, 32

POLICIES: dict[str, tuple[str, Callable[[int], Intervention]]] = {
    "nothing": ("control", lambda step: Intervention()),
    "palm": ("32 batches left out", lambda step: Intervention(skips=((step, LEFT_OUT),))),
    "clip": ("clip .3", lambda step: Intervention(clip=0.3)),
    "lower-rate": ("rate x .5", lambda step: Intervention(rate_factor=0.5)),
    "shrink": ("embedding gradient x .1", lambda step: Intervention(alpha=0.1)),
    "opt": (
        "32 batches left out, rate x .5, clip .3",
        lambda step: Intervention(rate_factor=0.5, clip=0.3, skips=((step, LEFT_OUT),)),
    ),
}


def measure(cell: Cell) -> Mapping[str, float]:
    run = collapsing(cell.config, cell.data)
    if run.onset is None or run.onset < 2 * BEFORE:
        return {"collapsed": 0.0}
    _, policy = POLICIES[cell.arm.name]
    came = comes_again(run, cell.data, before=BEFORE, watched=WATCHED + LATER, intervention=policy)
    return {"collapsed": 1.0, "came": float(came)}


STUDY = Study(
    name="policies",
    question="Which of the known ways out averts a collapse, from the same state?",
    arms=tuple(Arm(name=name, summary=said) for name, (said, _) in POLICIES.items()),
    seeds=24,
    settings={**CLIMB, "model.norm": "deepnorm"},
    data=proxy_text,
    measure=measure,
    outcomes={"came": Outcome(title="The collapse comes", margin=0.2, unit="share")},
    claims=(
        *(
            Claim(text=f"C8 {words} averts the collapse", metric="came", arm=name, baseline="nothing")
            for name, words in (
                ("opt", "OPT's way"),
                ("palm", "PaLM's way"),
                ("lower-rate", "Halving the rate"),
                ("clip", "Clipping at .3"),
                ("shrink", "Shrinking the embedding's gradient"),
            )
        ),
        Claim(text="C8 OPT's way averts more than PaLM's", metric="came", arm="opt", baseline="palm"),
    ),
    predictions=(
        "2026-11-29, before the runs: OPT's way and the halved rate avert it, PaLM's way, clip and shrink do not: the cause is "
        "the rate.",
    ),
)

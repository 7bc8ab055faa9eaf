"""C6. BF16 against FP16: which rate does each survive, and at what memory?

The frontier of fp16 is an overflow; bf16 has fp32's range. Memory is not a matter of seeds: ``glm plan`` counts it (RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import PROXY, proxy_text
from experiments.trial import frontier, trial
from experiments.verdicts import Claim


def measure(cell: Cell) -> Mapping[str, float]:
    return {
        "frontier": frontier(lambda rate: trial(cell.config, data=cell.data, rate=rate, heldout=False)),
        "heldout": trial(cell.config, data=cell.data, rate=2.0**-7).heldout,
    }


STUDY = Study(
    name="survival",
    question="Which rate does each number format survive, and what does it cost in loss at a rate that all bear?",
    arms=tuple(
        Arm(
            name=f"{norm}-{precision}",
            summary=f"{norm}, {precision}",
            settings={"model.norm": norm, "precision": precision},
        )
        for norm in ("pre", "deepnorm")
        for precision in ("fp16", "bf16")
    ),
    seeds=8,
    settings=PROXY,
    data=proxy_text,
    measure=measure,
    outcomes={
        "frontier": Outcome(title="Largest rate survived, log2", margin=0.5, unit="octaves", scale="rank"),
        "heldout": Outcome(title="Held-out loss at rate 2^-7", margin=0.02, unit="nats"),
    },
    claims=tuple(
        claim
        for norm in ("pre", "deepnorm")
        for claim in (
            Claim(
                text=f"C6 BF16 survives a higher rate than FP16, {norm}",
                metric="frontier",
                arm=f"{norm}-bf16",
                baseline=f"{norm}-fp16",
                direction="more",
            ),
            Claim(
                text=f"C6 FP16 trains to a lower loss than BF16, {norm}",
                metric="heldout",
                arm=f"{norm}-fp16",
                baseline=f"{norm}-bf16",
            ),
        )
    ),
    predictions=(
        "2026-11-29, before the runs: survival supported by an octave at least; losses equivalent within .02 nats.",
    ),
)

"""C12. Multi-task instruction pre-training: 5 % of the rows against none and 20 %, on tasks of services never trained on."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import PROXY, proxy_text
from experiments.suites._tasks import answers
from experiments.trial import trial
from experiments.verdicts import Claim


def measure(cell: Cell) -> Mapping[str, float]:
    run = trial(cell.config, data=cell.data)
    return {"heldout": run.heldout, **answers(run.trainer, cell.data)}


SHARES = {"0": "0", "5": "0.05", "20": "0.2"}

STUDY = Study(
    name="mip",
    question="Does 5 % of multi-task rows help on held-out tasks, against none and 20 %, and what does it cost in text?",
    arms=tuple(
        Arm(
            name=f"mip-{name}", summary=f"{name} % of the rows", settings={"objective.multitask-share": share}
        )
        for name, share in SHARES.items()
    ),
    seeds=10,
    settings={**PROXY, "model.norm": "pre", "steps": "200", "schedule.peak": "1.5e-2"},
    data=proxy_text,
    measure=measure,
    outcomes={
        "answer_loss": Outcome(title="Loss of right answers, held-out tasks", margin=0.05, unit="nats"),
        "advantage": Outcome(title="Right answer over wrong ones", margin=0.02, unit="nats a token"),
        "accuracy": Outcome(title="Accuracy", margin=0.03, unit="share"),
        "heldout": Outcome(title="Held-out loss of text", margin=0.02, unit="nats"),
    },
    claims=(
        *(
            Claim(
                text=f"C12 5 % of tasks {words} than none",
                metric=metric,
                arm="mip-5",
                baseline="mip-0",
                direction=direction,  # type: ignore[arg-type]
            )
            for metric, words, direction in (
                ("answer_loss", "makes right answers of held-out tasks likelier", "less"),
                ("advantage", "tells right answers from wrong ones better", "more"),
                ("accuracy", "answers more held-out tasks rightly", "more"),
                ("heldout", "costs more loss of text", "more"),
            )
        ),
        Claim(
            text="C12 20 % makes right answers likelier than 5 %",
            metric="answer_loss",
            arm="mip-20",
            baseline="mip-5",
        ),
    ),
    predictions=(
        "2026-11-29, before the runs: answers likelier, with 20 % more so; accuracy undecided at this size; no cost in text "
        "above .02.",
    ),
)

"""C7, second half. Does an embedding norm hurt zero-shot answers at equal loss?

Both arms train on the same rows, a fifth of them tasks; at four points of each run the study takes the held-out loss and the
answers. It compares the answers at equal held-out loss, the larger of the two final ones, by linear interpolation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import PROXY, proxy_text
from experiments.suites._tasks import answers
from experiments.trial import heldout_loss, trial
from experiments.verdicts import Claim
from glm.train.loop import Trainer

POINTS = (79, 119, 159, 199)


def measure(cell: Cell) -> Mapping[str, float]:
    curves: dict[bool, np.ndarray] = {}
    for norm in (False, True):
        embedding = dataclasses.replace(cell.config.model.embedding, norm=norm)
        config = dataclasses.replace(
            cell.config, model=dataclasses.replace(cell.config.model, embedding=embedding)
        )
        points: list[tuple[float, float, float]] = []

        def take(trainer: Trainer, step: int, points: list[tuple[float, float, float]] = points) -> None:
            if step in POINTS:
                found = answers(trainer, cell.data)
                points.append((heldout_loss(trainer, cell.data), found["answer_loss"], found["advantage"]))

        trial(config, data=cell.data, heldout=False, every=take)
        curves[norm] = np.array(points)
    level = max(curve[-1, 0] for curve in curves.values())
    at = {
        norm: [float(np.interp(-level, -curve[:, 0], curve[:, column])) for column in (1, 2)]
        for norm, curve in curves.items()
    }
    return {
        "level": level,
        "answer_loss": at[True][0] - at[False][0],
        "advantage": at[True][1] - at[False][1],
        "heldout": float(curves[True][-1, 0] - curves[False][-1, 0]),
    }


STUDY = Study(
    name="zero-shot-norm",
    question="At equal held-out loss, does a model with an embedding norm answer held-out tasks worse?",
    arms=(Arm(name="difference", summary="embedding norm less plain pre-LN"),),
    seeds=10,
    settings={
        **PROXY,
        "model.norm": "pre",
        "steps": "200",
        "schedule.peak": "1.5e-2",
        "objective.multitask-share": "0.2",
    },
    data=proxy_text,
    measure=measure,
    outcomes={
        "answer_loss": Outcome(title="Loss of right answers at equal loss", margin=0.05, unit="nats"),
        "advantage": Outcome(
            title="Right answer over wrong ones at equal loss", margin=0.02, unit="nats a token"
        ),
    },
    claims=(
        Claim(
            text="C7 At equal loss an embedding norm makes right answers less likely",
            metric="answer_loss",
            arm="difference",
            baseline=None,
            direction="more",
        ),
        Claim(
            text="C7 At equal loss an embedding norm tells right from wrong worse",
            metric="advantage",
            arm="difference",
            baseline=None,
        ),
    ),
    predictions=("2026-11-29, before the runs: equivalent or undecided: nothing at this size.",),
)

"""C4, second half. The residual stream ("main branch") against depth, trained, 6 to 24 layers, and how well each norm trains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import NEXT_TOKEN, PROXY, proxy_text
from experiments.suites.depth_init import slope
from experiments.trial import heldout_rows, trial
from experiments.verdicts import Claim
from glm.train.config import TrainConfig
from glm.train.loop import Trainer

DEPTHS = (6, 12, 24)
RATE = 2.0**-7


@torch.no_grad()
def branch(trainer: Trainer, cell: Cell) -> list[float]:
    """The largest |x| after each layer on eight held-out rows."""
    found: list[float] = []
    layers = list(trainer.engine.model.layers)  # type: ignore[arg-type]
    hooks = [
        layer.register_forward_hook(lambda _m, _i, y: found.append(float(y.abs().max()))) for layer in layers
    ]
    batch = heldout_rows(cell.data, TrainConfig(objective=cell.config.objective, model=cell.config.model))
    try:
        trainer.engine.model.hidden(  # type: ignore[operator]
            batch.tokens_BT[:8], batch.positions[:8], batch.segments_BT[:8], batch.context_BT[:8]
        )
    finally:
        for hook in hooks:
            hook.remove()
    return found


def measure(cell: Cell) -> Mapping[str, float]:
    values: dict[str, float] = {}
    last = []
    for layers in DEPTHS:
        config = dataclasses.replace(cell.config, model=dataclasses.replace(cell.config.model, layers=layers))
        run = trial(config, data=cell.data, rate=RATE)
        largest = branch(run.trainer, dataclasses.replace(cell, config=config))
        last.append(largest[-1])
        values |= {
            f"growth_{layers}": largest[-1] / largest[0],
            f"max_{layers}": max(largest),
            f"heldout_{layers}": run.heldout,
        }
    finite = all(math.isfinite(value) and value > 0 for value in last)
    values["over_depth"] = slope(np.array(DEPTHS), np.array(last)) if finite else math.inf
    return values


STUDY = Study(
    name="depth-trained",
    question="After training, whose main branch is large in deep models, and which norm trains best there?",
    arms=tuple(
        Arm(name=norm, summary=said, settings={"model.norm": norm})
        for norm, said in (("pre", "pre-LN"), ("deepnorm", "DeepNorm"))
    ),
    seeds=8,
    settings={**PROXY, **NEXT_TOKEN, "steps": "40", "schedule.warmup": "10"},
    data=proxy_text,
    measure=measure,
    outcomes={
        "growth_24": Outcome(title="Main branch, layer 24 over layer 1", margin=0.1, scale="log"),
        "max_24": Outcome(title="Largest value of the main branch, 24 layers", margin=0.1, scale="log"),
        "heldout_24": Outcome(title="Held-out loss, 24 layers", margin=0.02, unit="nats"),
    },
    claims=(
        Claim(text="C4 Trained, DeepNorm's main branch grows less from layer 1 to 24 than pre-LN's", metric="growth_24",
        arm="deepnorm", baseline="pre"), Claim(text="C4 Trained, DeepNorm's largest value is below pre-LN's, 24 layers",
        metric="max_24", arm="deepnorm", baseline="pre"), Claim(text="C4 DeepNorm trains to a lower loss than pre-LN, 24 layers",
        metric="heldout_24", arm="deepnorm", baseline="pre"),
    ),
    predictions=(
        "2026-11-29, before the runs: growth supported, largest value undecided or against (alpha is 6.9 at 24 layers), loss "
        "against.",
    ),
)  # fmt: skip

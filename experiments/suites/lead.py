"""C1. Does a collapse lag a spike of the gradient norm by a few steps?

GLM-130B: "training collapse usually lags behind a spike in gradient norm by a few training steps". An *alarm* is a finite gradient
norm of more than ``RISE`` times the median of the 20 steps before. For each collapse, was there an alarm within the 16 steps before
its onset? The null is the same run with the window laid at every earlier place: an alarm that comes all the time warns of nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._collapse import CLIMB, collapsing
from experiments.suites._proxy import proxy_text
from experiments.trial import Floats
from experiments.verdicts import Claim

WINDOW, PAST = 16, 20
RISES = (4.0, 2.0)


def alarms(norm: Floats, rise: float, past: int = PAST) -> np.ndarray:
    """Which steps' norms are alarms: finite, and over ``rise`` times the median of the finite ones of the ``past`` steps before."""
    found = np.zeros(len(norm), dtype=bool)
    for step in range(past, len(norm)):
        before = norm[step - past : step]
        before = before[np.isfinite(before)]
        if len(before) >= past // 2 and math.isfinite(norm[step]):
            found[step] = norm[step] > rise * np.median(before)
    return found


def measure(cell: Cell) -> Mapping[str, float]:
    run = collapsing(cell.config, cell.data)
    values: dict[str, float] = {"collapsed": float(run.onset is not None)}
    onset = run.onset
    if onset is None or onset < PAST + 2 * WINDOW:
        return values
    values["onset"] = onset
    for rise in RISES:
        found = alarms(run.norm, rise)
        inside = found[onset - WINDOW : onset]
        places = range(PAST, onset - 2 * WINDOW + 1)
        usual = float(np.mean([found[at : at + WINDOW].any() for at in places]))
        name = f"{rise:g}x"
        values[f"advance_{name}"] = float(inside.any()) - usual
        values[f"warned_{name}"] = float(inside.any())
        values[f"usual_{name}"] = usual
        if inside.any():
            values[f"lead_{name}"] = float(WINDOW - np.flatnonzero(inside)[0])
    # What else rises: the same question of each group's gradient.
    for group in ("embedding", "attention", "feed_forward"):
        found = alarms(run.groups[group], RISES[0])
        places = range(PAST, onset - 2 * WINDOW + 1)
        usual = float(np.mean([found[at : at + WINDOW].any() for at in places]))
        values[f"advance_{group}"] = float(found[onset - WINDOW : onset].any()) - usual
    return values


ARMS = (
    Arm(name="pre", summary="pre-LN", settings={"model.norm": "pre"}),
    Arm(name="deepnorm", summary="DeepNorm", settings={"model.norm": "deepnorm"}),
)

STUDY = Study(
    name="lead",
    question="Does a collapse lag a spike of the gradient norm by a few steps, more often than chance has it?",
    arms=ARMS,
    seeds=40,
    settings=CLIMB,
    data=proxy_text,
    measure=measure,
    outcomes={
        "advance_4x": Outcome(
            title="Alarm within 16 steps before, over its usual share", margin=0.1, unit="share"
        ),
        "advance_2x": Outcome(title="The same, alarms at twice the median", margin=0.1, unit="share"),
    },
    claims=tuple(
        Claim(
            text=f"C1 A spike of the gradient norm ({rise:g} times its median) precedes the collapse, {arm.summary}",
            metric=f"advance_{rise:g}x",
            arm=arm.name,
            baseline=None,
            direction="more",
        )
        for rise in RISES
        for arm in ARMS
    ),
    predictions=(
        "2026-11-29, before the runs: supported for 2x, by less than half of the collapses for 4x: in fp16 the forward pass "
        "overflows "
        "first, and the norm has risen only with the rate.",
    ),
)

"""Runs that collapse by themselves, and forks of the states before: several suites share these runs.

The rate climbs by 2^-7.3 an update for 240 updates, past what the model bears, in fp16 with GLM-130B's clip of 1; so collapses fall
at many rates and steps, and a run has a past to compare with. A collapse is the terminal one (``experiments.trial``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from experiments.suites._proxy import PROXY
from experiments.trial import Trial, group_of, trial
from glm.train.checkpoint import Checkpoint
from glm.train.config import TrainConfig
from glm.train.intervention import Intervention
from glm.train.loop import Trainer
from glm.train.replay_forks import Change
from glm.train.state_ring import StateRing

CLIMB = {**PROXY, "precision": "fp16", "steps": "240", "schedule.warmup": "240", "schedule.peak": "1.5"}
EVERY = 2
# A fork ends this many steps after the original's collapse, and collapses too if it is out of course for ten of them.
WATCHED = 25
GRACE = 10


@lru_cache(maxsize=4)
def collapsing(config: TrainConfig, data: Path) -> Trial:
    """The run, with its states: shared by the arms of a seed."""
    return trial(config, data=data, heldout=False, ring=StateRing(every=EVERY, size=130))


def state_before(run: Trial, steps: int) -> Checkpoint:
    """The newest state at least ``steps`` before the collapse."""
    assert run.onset is not None
    assert run.ring is not None
    state = run.ring.newest_at(run.onset - steps)
    assert state is not None
    return state


def comes_again(
    run: Trial,
    data: Path,
    *,
    before: int,
    watched: int = WATCHED,
    withheld: Callable[[str], bool] | None = None,
    until: int = 0,
    intervention: Callable[[int], Intervention] | None = None,
) -> bool:
    """Whether a fork from ``before`` steps ahead collapses as well, by ``GRACE`` steps after the original did.

    Args:
        withheld: whether a group's weights and moments stand still (``glm.train.replay_forks``) up to ``until`` steps after the
            original's collapse.
        intervention: gives the fork's intervention, from the number of its first step.
        watched: steps after the original's collapse at which the fork ends; the grace grows with it.
    """
    assert run.onset is not None
    state = state_before(run, before)
    end = run.onset + until

    def prepare(trainer: Trainer) -> None:
        if intervention is not None:
            trainer.intervention = intervention(trainer.step)
        if withheld is not None:
            held = tuple(name for name in trainer.engine.tensors()[0] if withheld(group_of(name)))
            if held:
                Change(hold=held, hold_steps=end - trainer.step).apply(trainer)

    fork = trial(
        dataclasses.replace(run.config),
        data=data,
        start=state,
        until=run.onset + watched,
        heldout=False,
        prepare=prepare,
    )
    return fork.onset is not None and fork.onset <= run.onset + watched - WATCHED + GRACE

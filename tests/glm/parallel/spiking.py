"""Runs with a planted spike, which the detector of the first process must see and every process answer. Not a test itself."""

from __future__ import annotations

import hashlib
from typing import Any

from glm.data.batch import Batch
from glm.data.loader import Loader
from glm.data.shards import TokenData
from glm.distributed.config import ParallelConfig
from glm.model.config import ModelConfig
from glm.train.config import BatchConfig, MonitorConfig, TrainConfig
from glm.train.engine import Engine
from glm.train.events import Callback
from glm.train.loop import Trainer
from glm.train.monitoring import MonitorCallback
from glm.train.rate_schedule import ScheduleConfig
from stabilitylab.spikes import ResponderConfig

POLICIES = ("lower-rate", "skip-batch", "roll-back", "escalate")
# Enough rows that a batch's loss scatters by 2 % only and the planted rise stands out: the detector first learns the noise.
ROWS = 16
# Steps whose rows, as an undisturbed run would see them, have an absurd target everywhere.
BAD_STEPS = (30, 31, 32, 46, 47)
RARE = 999


class Planted(Loader):
    """Rows of some sample numbers are spoilt."""

    def samples(self, numbers: Any) -> Batch:
        batch = super().samples(numbers)
        for targets_T, number in zip(batch.targets_BT, numbers, strict=True):
            if number // ROWS in BAD_STEPS:
                # A different one each time: a target learned at the first spot would hardly stand out at the next.
                targets_T[targets_T >= 0] = RARE - number // ROWS
        return batch


class Record(Callback):
    """Writes down what was done."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, float]] = []
        self.decisions: list[tuple[int, str]] = []

    def step_end(self, info):
        self.steps.append((info.step, info.first_sample, info.loss))
        return ()

    def event(self, event):
        if event.kind in ("response", "rewind"):
            self.decisions.append((event.step, event.data.get("kind", event.kind)))


def spiking(policy: str, axes: tuple[int, int, int] = (1, 1, 1), micro: int = 4) -> TrainConfig:
    t, p, d = axes
    own = {"hard_batches": True, "rollback_steps": 3, "cooldown": 2, "rate_factor": 0.3}
    if policy in ("roll-back", "escalate"):
        own["skip_batches"] = 5
    return TrainConfig(
        steps=52,
        seed=1,
        model=ModelConfig(vocabulary=1000, layers=1, hidden=32, heads=2, length=64),
        batch=BatchConfig(rows=ROWS, micro_rows=micro),
        schedule=ScheduleConfig(peak=1e-2, warmup=5, shape="constant"),
        responder=ResponderConfig() if policy == "none" else ResponderConfig(policy=policy, **own),
        parallel=ParallelConfig(tensor=t, pipeline=p, data=d),
    )


def answer(config: TrainConfig, engine: Engine, data: TokenData) -> dict[str, Any]:
    """Train; what was done, and a fingerprint of the weights that this process computes with."""
    loader = Planted(data, config.objective, config.sampling, length=config.model.length, seed=config.seed)
    record = Record()
    watch = MonitorCallback(None, MonitorConfig(every=0, gradients_every=0))
    assert Trainer(config, engine, loader, callbacks=(watch, record)).train()
    digest = hashlib.sha256()
    for parameter in engine.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return {"steps": record.steps, "decisions": record.decisions, "weights": digest.hexdigest()}

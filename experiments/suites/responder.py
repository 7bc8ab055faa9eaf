"""Runs that break by themselves, and what each of the responder's policies makes of them.

The learning rate climbs for 300 steps to many times what the model bears, unclipped, and stays there for 100 more. Every run leaves
its course on the way: in fp32 the loss climbs for good, in fp16 numbers overflow and the scaler skips updates. Each policy
starts from the same weights, sees the same batches until its first decision, and decides on what the monitor of ``glm train``
notices.

    diverges    without a responder the run is out of course at its end (``experiments.trial.collapse_onset``)
    ends        with one it is not: the divergence came to an end, in the history that stands after all rollbacks

Only seeds whose run diverges without a responder count. Shares with exact intervals: ``python -m experiments verdicts``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import proxy_text
from experiments.trial import collapse_onset, trial
from experiments.verdicts import Claim
from glm.train.config import TrainConfig
from glm.train.events import Callback, StepInfo
from glm.train.monitoring import MonitorCallback
from stabilitylab.spikes import ResponderConfig
from stabilitylab.telemetry import Event

SOURCE = "OPT-175B (2205.01068), PaLM (2204.02311)"
# (arm, what it does): the policy is the arm's name, in either format.
POLICIES = (
    ("skip-batch", "back to before the onset, its batches left out"),
    ("clip", "clip at 0.3 from there on"),
    ("lower-rate", "rate x 0.3 at each episode"),
    ("roll-back", "back 40 steps, 20 batches left out"),
    ("escalate", "skip, clip, lower the rate, roll back"),
)


class _History(Callback):
    """The losses of the history that stands, and how many decisions were carried out."""

    def __init__(self) -> None:
        self.loss: dict[int, float] = {}
        self.decisions = 0

    def step_end(self, info: StepInfo) -> Sequence[Event]:
        self.loss[info.step] = info.loss
        return ()

    def event(self, event: Event) -> None:
        if event.kind == "rewind":
            self.loss = {step: loss for step, loss in self.loss.items() if step < event.step}
        self.decisions += event.kind == "response" and event.data.get("kind") != "give-up"

    @property
    def losses(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([self.loss[step] for step in sorted(self.loss)])


def trained(config: TrainConfig, data: Path) -> _History:
    """One run, watched as ``glm train`` watches it, without a folder."""
    history = _History()
    watch = MonitorCallback(None, config.monitor)
    trial(config, data=data, ends_early=False, heldout=False, callbacks=(watch, history))
    return history


@lru_cache(maxsize=4)
def diverges(config: TrainConfig, data: Path) -> bool:
    """Whether the run is out of course at its end: asked once by all policies of a seed."""
    return collapse_onset(trained(config, data).losses) is not None


def measure(cell: Cell) -> Mapping[str, float]:
    alone = dataclasses.replace(cell.config, responder=ResponderConfig())
    out = diverges(alone, cell.data)
    if not cell.config.responder.active:
        return {"diverged": float(out), **({"ended": 0.0} if out else {})}
    if not out:
        return {}
    history = trained(cell.config, cell.data)
    last = float(np.mean(history.losses[-40:]))
    return {
        "ended": float(collapse_onset(history.losses) is None),
        "decisions": float(history.decisions),
        "last_loss": last if math.isfinite(last) else math.inf,
    }


STUDY = Study(
    name="responder",
    question=(
        "A run whose learning rate grows past what it bears diverges. Does that end when a responder leaves batches out, clips "
        "tighter, lowers the rate, goes back, or tries these one after the other?"
    ),
    preset="glm-proxy",
    seeds=8,
    settings={
        "steps": "400",
        "schedule.peak": "1.0",
        "schedule.warmup": "300",
        "schedule.shape": "constant",
        "optimizer.clip": "0",
        "monitor.every": "10",
        "responder.rate-factor": "0.3",
        "responder.rollback-steps": "40",
        "responder.skip-batches": "20",
    },
    arms=tuple(
        Arm(
            name=prefix + name,
            summary=said,
            settings={"precision": precision, **({"responder.policy": name} if name != "none" else {})},
        )
        for prefix, precision in (("", "fp32"), ("fp16-", "fp16"))
        for name, said in (("none", "no responder"), *POLICIES)
        if not prefix or name in ("none", "lower-rate", "escalate")
    ),
    claims=tuple(
        Claim(
            text=f"{words} ends a divergence",
            metric="ended",
            arm=arm,
            baseline="fp16-none" if arm.startswith("fp16") else "none",
            direction="more",
            source=SOURCE,
        )
        for arm, words in (
            ("lower-rate", "Lowering the rate"),
            ("clip", "Clipping tighter"),
            ("skip-batch", "Leaving its batches out"),
            ("roll-back", "Going back and leaving batches out"),
            ("escalate", "Escalating"),
            ("fp16-lower-rate", "In fp16, lowering the rate"),
            ("fp16-escalate", "In fp16, escalating"),
        )
    ),
    predictions=(
        "2026-11-29, before the runs on this proxy: lowering the rate and escalating end it, going back and leaving batches out "
        "do not, since the cause is the rate; clipping is open.",
    ),
    outcomes={
        "ended": Outcome(title="The divergence ends", margin=0.2, unit="share"),
        "diverged": Outcome(title="Diverges without a responder", margin=0.2, unit="share"),
        "decisions": Outcome(title="Decisions carried out", margin=1.0, scale="rank"),
        "last_loss": Outcome(title="Mean loss of the last 40 steps", margin=0.05, unit="nats", scale="rank"),
    },
    data=proxy_text,
    measure=measure,
)

"""A trial is one short run in this process, kept in memory; suites of hundreds of runs consist of trials.

It is the run that ``glm train --device cpu`` makes from the same flags, step by step and bit for bit, without a folder: the loop,
the engine and the data are the same objects. A comparison needs little of it, so the trial keeps a few numbers per step:

    loss            nats a target                                  norm      global gradient norm before clipping
    groups          L2 norm of the gradient by parameter group     scale     loss scale;  skipped: nothing was applied

Groups are GLM-130B's suspects: the embedding (an untied output projection apart), attention, feed-forward, and norms.

A run whose loss is lost for good ends early and counts as collapsed, so that searches for the rate that a model bears do not pay
for what happens beyond it. A trial can begin from a state, so K forks of one state share all earlier steps.

    out of course   the loss's running median of 9 exceeds its lowest value so far by ``margin`` nats, or is not finite
    collapse        the last such stretch, where it lasts to the end and 10 steps at least: its first step is the onset (an
                    excursion that recovers is none)
    dead            lost for good, by the rule of ``glm/train/lost_run.py``, for 10 steps

Skipped updates of a loss scale that finds its level count as none of these.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from glm.commands.train import parse_command, with_vocabulary
from glm.data.batch import Batch
from glm.data.config import ObjectiveConfig
from glm.data.loader import Loader
from glm.data.shards import TokenData, open_data
from glm.train import heldout as fixed
from glm.train.checkpoint import Checkpoint
from glm.train.config import TrainConfig
from glm.train.engine import LocalEngine
from glm.train.events import Callback, StepInfo
from glm.train.gradient_summary import GradientSummary
from glm.train.loop import Trainer
from glm.train.lost_run import LostRule
from glm.train.state_ring import StateRing
from stabilitylab.telemetry import Event

Floats = NDArray[np.float64]

GROUPS = ("embedding", "attention", "feed_forward", "norm", "projection")
MARGIN, PATIENCE, SMOOTH = 0.5, 10, 9
HELDOUT_ROWS = 64


def group_of(parameter: str) -> str:
    """The group of a parameter's name. Learned positions belong to the embedding, biases to their layer's matrix."""
    if parameter.startswith(("embedding.", "positions")):
        return "embedding"
    if parameter.startswith("projection"):
        return "projection"
    for kind in ("attention", "feed_forward"):
        if f".{kind}." in parameter and "norm" not in parameter.rpartition(f".{kind}.")[2].split(".")[0]:
            return kind
    return "norm"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run's results. Arrays have one value per step, from ``first`` on.

    Attributes:
        config: of the run.
        first: number of the first step.
        loss, norm, scale: see the module's head.
        groups: gradient norm of each group.
        skipped: whether the step skipped its update.
        died: the run ended early, since its loss was lost.
        heldout: mean loss a target on the fixed held-out rows at the end; infinite if it died or is not finite. NaN: not asked for.
        trainer: the run where it ended, to measure its weights.
        ring: states on the way, if asked for.
    """

    config: TrainConfig
    first: int
    loss: Floats
    norm: Floats
    scale: Floats
    groups: Mapping[str, Floats]
    skipped: NDArray[np.bool_]
    died: bool
    heldout: float
    trainer: Trainer = field(repr=False)
    ring: StateRing | None = field(repr=False, default=None)

    @property
    def onset(self) -> int | None:
        """The step at which the collapse begins; None where the run did not end in one."""
        place = collapse_onset(self.loss, ended=self.died)
        return None if place is None else self.first + place

    @property
    def survived(self) -> bool:
        return not self.died and self.onset is None


def running_median(values: NDArray[np.floating], width: int = SMOOTH) -> Floats:
    """Median of each value and the ``width - 1`` before it; infinite where most of them are not finite."""
    clean = np.where(np.isfinite(values), values, np.inf)
    padded = np.concatenate([np.full(width - 1, clean[0]), clean])
    # The lower median of an odd window: infinite only where the majority is.
    medians: Floats = np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)
    return medians


def collapse_onset(loss: NDArray[np.floating], *, ended: bool = False, margin: float = MARGIN) -> int | None:
    """Place of the terminal excursion's first value in ``loss``; None where the end is not out of course.

    ``ended``: the run ended early as dead, which is a collapse whatever the median says.
    """
    if not len(loss):
        return None
    smooth = running_median(loss)
    with np.errstate(invalid="ignore"):
        out = ~(smooth - np.minimum.accumulate(smooth) <= margin)
    inside = np.flatnonzero(~out)
    begin = int(inside[-1]) + 1 if len(inside) else 0
    if len(loss) - begin < PATIENCE:
        if not ended:
            return None
        begin = max(0, len(loss) - PATIENCE)
    # The median lags by its window: the excursion's own first value lies up to half a window earlier.
    level = smooth[: begin + 1].min() + margin
    while begin > 0 and not loss[begin - 1] <= level:
        begin -= 1
    return begin


class _Record(Callback):
    """Keeps a step's numbers, and asks the trainer to stop when the run is dead."""

    def __init__(self, *, ends_early: bool, every: Callable[[Trainer, int], None] | None = None) -> None:
        self.loss: list[float] = []
        self.norm: list[float] = []
        self.scale: list[float] = []
        self.skipped: list[bool] = []
        self.groups: list[dict[str, float]] = []
        self.first: int | None = None
        self.died = False
        self._every = every
        self._rule = LostRule(PATIENCE if ends_early else 0)
        self._members: dict[str, str] = {}
        self._trainer: Trainer | None = None

    def train_start(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def gradients_ready(self, step: int, gradients: GradientSummary) -> None:
        del step
        names = list(gradients.norms)
        values = torch.stack(list(gradients.norms.values())).double().square().tolist() if names else []
        found = dict.fromkeys(GROUPS, 0.0)
        for name, value in zip(names, values, strict=True):
            found[self._members.setdefault(name, group_of(name))] += value
        self.groups.append({group: math.sqrt(value) for group, value in found.items()})

    def step_end(self, info: StepInfo) -> Sequence[Event]:
        if self.first is None:
            self.first = info.step
        self.loss.append(info.loss)
        self.norm.append(info.gradient_norm)
        self.scale.append(info.loss_scale)
        self.skipped.append(info.skipped)
        assert self._trainer is not None
        if self._every is not None:
            self._every(self._trainer, info.step)
        scaler = getattr(self._trainer.engine, "scaler", None)
        stuck = scaler is not None and scaler.collapsed
        if self._rule.update(info.loss, stuck=stuck):
            self.died = True
            self._trainer.stop_requested = True
        return ()


@lru_cache(maxsize=8)
def _data(path: Path) -> TokenData:
    return open_data(path)


@lru_cache(maxsize=256)
def _parsed(words: tuple[str, ...], data: Path) -> TrainConfig:
    command = parse_command([*words, "--data", str(data), "--out", "unused"])
    return with_vocabulary(command.config, _data(data))


def configured(preset: str, settings: Mapping[str, str], *, data: Path) -> TrainConfig:
    """The configuration of ``glm train PRESET`` with these flags (an empty value is a flag without one)."""
    words = (preset, *(word for flag, value in settings.items() for word in (f"--{flag}", value) if word))
    return _parsed(words, data)


@lru_cache(maxsize=16)
def _rows_of(data: Path, objective: ObjectiveConfig, length: int) -> Batch:
    return fixed.heldout_rows(_data(data), objective, length=length, rows=HELDOUT_ROWS)


def heldout_rows(data: Path, config: TrainConfig) -> Batch:
    """The fixed rows that judge every run of an objective: the same for all seeds and arms."""
    return _rows_of(data, config.objective, config.model.length)


def heldout_loss(trainer: Trainer, data: Path) -> float:
    """Mean loss a target on the held-out rows; infinite where it is not finite."""
    return fixed.heldout_loss(trainer.engine.model, heldout_rows(data, trainer.config))


def trial(
    config: TrainConfig,
    *,
    data: Path,
    seed: int | None = None,
    rate: float | None = None,
    start: Checkpoint | None = None,
    until: int | None = None,
    ends_early: bool = True,
    heldout: bool = True,
    ring: StateRing | None = None,
    engine: Callable[[TrainConfig], LocalEngine] = LocalEngine,
    prepare: Callable[[Trainer], None] | None = None,
    every: Callable[[Trainer, int], None] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trial:
    """Make a run.

    Args:
        config: from ``configured``; ``seed`` and ``rate`` replace its own.
        data: folder made by ``glm shards``.
        start: a state to begin from; None: the beginning.
        until: stop before this step; None: all of the configuration's.
        ends_early: end a dead run.
        heldout: measure the held-out loss at the end.
        ring: keeps states on the way.
        engine: makes the engine.
        prepare: changes the trainer before its first step (an intervention).
        every: called after each step with the trainer and the step's number.
        callbacks: further observers; their events go to the configuration's responder.
    """
    if seed is not None:
        config = dataclasses.replace(config, seed=seed)
    if rate is not None:
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, peak=rate))
    config = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, every=0, ring=0, asynchronous=False)
    )
    opened = _data(data)
    loader = Loader(opened, config.objective, config.sampling, length=config.model.length, seed=config.seed)
    record = _Record(ends_early=ends_early, every=every)
    trainer = Trainer(config, engine(config), loader, callbacks=(record, *callbacks))
    if ring is not None or not config.responder.active:
        trainer._ring = ring
    if start is not None:
        trainer.restore(start)
    if prepare is not None:
        prepare(trainer)
    trainer.train(until=until)
    judged = heldout_loss(trainer, data) if heldout and not record.died else math.inf
    return Trial(
        config=config,
        first=record.first if record.first is not None else trainer.step,
        loss=np.array(record.loss),
        norm=np.array(record.norm),
        scale=np.array(record.scale),
        groups={group: np.array([one[group] for one in record.groups]) for group in GROUPS},
        skipped=np.array(record.skipped, dtype=bool),
        died=record.died,
        heldout=judged if heldout else math.nan,
        trainer=trainer,
        ring=ring,
    )


# ------------------------------------------------------------------------------------------------------- the rate it bears

# Half octaves, log2 of the peak learning rate.
GRID = tuple(np.arange(-4.5, 0.51, 0.5).tolist())


def frontier(run: Callable[[float], Trial], grid: Sequence[float] = GRID) -> float:
    """log2 of the largest rate of the grid that survives, by bisection: ``run(rate)`` makes the trial.

    One step below the grid's first rate where none survives, its last where all do. Between them the search assumes that survival
    ends once, which a noisy frontier does not promise: the answer is one of its crossings.
    """
    low, high = -1, len(grid)
    while high - low > 1:
        middle = (low + high) // 2
        if run(2.0 ** grid[middle]).survived:
            low = middle
        else:
            high = middle
    return grid[low] if low >= 0 else grid[0] - (grid[1] - grid[0])

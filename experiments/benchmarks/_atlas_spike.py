"""Trains and watches one run of the atlas; detector, forensics and forks judge it.

A run is the healthy run of its seed up to ``SEEN`` steps before the planted one. The healthy run trains once for all recipes, keeps
the states from which they begin, and goes on without a plant: the *twin*. A run's *excess* is its loss less the twin's at the same
step and batch: there is a spike where it reaches ``MADE`` nats, whoever notices. By construction it is

    hard-batch   one batch is spoiled, and two steps later three quarters of the excess are gone
    spike        the plant acts once, and at the end of the run (``TAIL`` steps on) three quarters are gone
    divergence   half of it or more is there at the end
    non-finite   the loss is not finite
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.benchmarks._atlas_loop import AtlasLoop, chain
from experiments.benchmarks._atlas_recipes import BLOCKS, CLIMBS, Recipe
from experiments.benchmarks.forensics import module_of
from stabilitylab import Monitor
from stabilitylab.attribution import LoopState, attribute
from stabilitylab.formats import fake_quantize, scaled_format
from stabilitylab.runs import Run, load_run
from stabilitylab.spikes import Episode, SpikeDetector, episodes_of
from stabilitylab.telemetry import LOSS, Event

# Steps that a monitor sees before the planted one and after it; the run's end; the twin's steps with plants.
SEEN, AFTER, TAIL, PLACES = 26, 16, 44, (80, 84, 88, 92)
# Forks begin this many steps before the onset, keep states from twice as far, and watch for this many.
BEFORE, KEPT, WATCHED, LATE = 6, 14, 10, 10
MADE, AROUND = 0.4, 24
# Watch emergent recipes up to there.
LAST = 96
# Measure harm this many steps after the planted one.
HORIZONS = (10, 40)
_FOUR_BITS = scaled_format("nvfp4")
_NEAR = (
    ("train", "loss"),
    ("train", "gradient_norm"),
    ("gradient", "l2"),
    ("activation", "absmax"),
    ("activation", "rms"),
    ("attention", "score_max"),
    ("update", "rms"),
    ("update", "rms_t"),
    ("update", "second_moment_l2"),
)


@dataclass(frozen=True)
class Twin:
    """The healthy run of a seed: losses by step, states from which runs begin, measures after the plants."""

    losses: list[float]
    states: dict[int, LoopState]
    measures: dict[int, dict[str, float]]


@functools.lru_cache(maxsize=48)
def twin(seed: int, beta2: float, aged: bool, clip: float, precision: str) -> Twin:
    """Train the twin."""
    recipe = Recipe(
        name="", family="", cause="", beta2=beta2, aged=aged, clip=clip, precision=precision, planted=False
    )
    loop = AtlasLoop(recipe, seed, 10**9, layers=BLOCKS)
    losses: list[float] = []
    states: dict[int, LoopState] = {}
    measures: dict[int, dict[str, float]] = {}
    measured = {place + horizon for place in PLACES for horizon in HORIZONS}
    for step in range(max(PLACES) + TAIL):
        if step in measured:
            measures[step] = measure(loop)
        if step + SEEN in PLACES:
            states[step] = LoopState.of(loop, step)
        losses.append(loop.train_step(step))
    return Twin(losses, states, measures)


def spike(recipe: Recipe, number: int, seed: int, telemetry: Path, *, forks: bool = True) -> dict[str, Any]:
    """Train, find the episode, explain it, prove it. ``telemetry`` takes the Parquet around it.

    Returns a row of the atlas; ``onset`` None: the recipe made no spike. Without ``forks`` there is no proof: ``attribute`` is
    None.
    """
    began = time.process_time()
    planted = PLACES[(seed + number) % len(PLACES)] if recipe.planted else 10**9
    loop = AtlasLoop(recipe, seed, planted, layers=BLOCKS)
    row: dict[str, Any] = {
        "recipe": recipe.name,
        "family": recipe.family,
        "seed": seed,
        "planted": planted if recipe.planted else None,
        "held_out": recipe.held_out,
        "truth": recipe.cause,
        "truths": [recipe.cause, *recipe.causes],
        "truth_site": recipe.site,
        "onset": None,
        "missed": False,
    }
    healthy = twin(seed, recipe.beta2, recipe.aged, recipe.clip, recipe.precision) if recipe.planted else None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = Path(folder) / "run"
        losses, states = _planted(loop, healthy, out) if healthy is not None else _emergent(loop, out)
        row["losses"] = [round(v, 4) if math.isfinite(v) else None for v in losses]
        excess = [] if healthy is None else _excess(losses, healthy, planted)
        if healthy is not None:
            row["true_kind"] = kind_of(recipe, excess)
            if row["true_kind"] is None:
                return row
            if row["true_kind"] in ("hard-batch", "spike") and recipe.passes:
                row["harm"] = _harm(loop, healthy, planted, losses)
        first = planted if recipe.planted else CLIMBS
        one = _episode(_episodes(losses), first, recipe.planted)
        run = load_run(out)
        online = _episode(episodes_of(run.events), first, recipe.planted)
        if one is None and healthy is None:
            return row
        # A spike that the detector misses is there all the same.
        onset = (
            one.onset if one is not None else planted + next(i for i, v in enumerate(excess) if v >= MADE / 2)
        )
        told = _told(run, first, online)
        row |= {
            "onset": onset,
            "missed": one is None,
            "kind": None if one is None else one.kind,
            "height": max(excess, default=one.height if one is not None else None),
            "told_at": None if online is None else online.told,
            "forensics": None if told is None else told.data["cause"],
            "forensics_site": None if told is None else module_of(told.data["site"] or ""),
            "attribute": None,
            "attribute_site": None,
            "repeats": None,
            "forks": [],
        }
        telemetry.parent.mkdir(parents=True, exist_ok=True)
        _near(run, onset).to_parquet(telemetry, index=False, compression="zstd")
    if not forks:
        return row | {"seconds": time.process_time() - began}
    begin = max(step for step in states if step <= max(0, onset - KEPT))
    given = one if one is not None else onset
    if online is not None and online.onset == onset:
        given = online
    proof = attribute(
        loop,
        given,
        begin=begin,
        state=states[begin],
        original=dict(enumerate(losses)),
        before=BEFORE,
        watched=WATCHED,
        budget=120.0,
        thorough=False,
    )
    row |= {
        "attribute": proof.cause,
        "attribute_site": None if proof.site is None else module_of(proof.site.partition(" ")[0]),
        "sentence": proof.sentence,
        "repeats": proof.repeats,
        "forks": [
            [fork.without.words, fork.verdict.word, fork.verdict.height, fork.verdict.area]
            for fork in proof.forks
        ],
        "seconds": time.process_time() - began,
    }
    return row


def kind_of(recipe: Recipe, excess: list[float]) -> str | None:
    """The spike's kind by construction; None: there is no spike; "": none of the kinds."""
    if any(not math.isfinite(v) for v in excess):
        return "non-finite"
    most = max(excess[: LATE + 2])
    if most < MADE:
        return None
    if recipe.family == "batch":
        return "hard-batch" if max(excess[2:5]) <= most / 4 else "spike"
    last = sorted(excess[-8:])[4]
    return "spike" if last <= most / 4 else "divergence" if last >= most / 2 else ""


@torch.no_grad()
def measure(loop: AtlasLoop) -> dict[str, float]:
    """Measure at the present weights, over batches outside training: loss, what NVFP4 weights add to it, outliers.

    ``outliers`` is the largest ratio of a channel's maximum to the RMS of a block's output.
    """
    batch = torch.cat([chain(loop.seed, 10**6 + i) for i in range(4)])
    most: list[float] = []
    hooks = [
        block.register_forward_hook(
            lambda module, args, out: most.append(float(out.abs().max() / out.square().mean().sqrt()))
        )
        for block in loop.model.blocks  # type: ignore[union-attr]
    ]
    loss = float(loop.loss(batch))
    for hook in hooks:
        hook.remove()
    matrices = [p for name, p in loop.model.named_parameters() if p.dim() == 2 and "blocks" in name]
    kept = [p.clone() for p in matrices]
    for p in matrices:
        p.copy_(fake_quantize(p, _FOUR_BITS))
    quantized = float(loop.loss(batch))
    for p, weight in zip(matrices, kept, strict=True):
        p.copy_(weight)
    return {"loss": loss, "quantized": quantized - loss, "outliers": max(most)}


def _harm(loop: AtlasLoop, healthy: Twin, planted: int, losses: list[float]) -> dict[str, float]:
    """Measures of the run less those of its twin, at equal steps; the run took its own in passing."""
    found = dict[str, float]()
    for horizon in HORIZONS:
        mine, theirs = loop.measures.get(planted + horizon), healthy.measures[planted + horizon]
        if mine is not None:
            found |= {f"{name} after {horizon}": mine[name] - theirs[name] for name in mine}
    return found


def _planted(loop: AtlasLoop, healthy: Twin, folder: Path) -> tuple[list[float], dict[int, LoopState]]:
    begin = loop.planted - SEEN
    healthy.states[begin].put_into(loop)
    losses, states = healthy.losses[:begin], dict[int, LoopState]()
    with _monitor(loop, folder, losses) as monitor:
        for step in range(begin, loop.planted + AFTER):
            _step(loop, step, losses, states)
            monitor.step(step, loss=losses[-1])
    for step in range(loop.planted + AFTER, loop.planted + TAIL):
        if not math.isfinite(losses[-1]):
            break
        _step(loop, step, losses, states)
    return losses, states


def _emergent(loop: AtlasLoop, folder: Path) -> tuple[list[float], dict[int, LoopState]]:
    losses, states = list[float](), dict[int, LoopState]()
    for step in range(CLIMBS - KEPT):
        losses.append(loop.train_step(step))
    with _monitor(loop, folder, losses) as monitor:
        for step in range(CLIMBS - KEPT, LAST):
            if step % 4 == 0:
                states[step] = LoopState.of(loop, step)
            losses.append(loop.train_step(step))
            monitor.step(step, loss=losses[-1])
            if not math.isfinite(losses[-1]):
                break
    return losses, states


def _monitor(loop: AtlasLoop, folder: Path, losses: list[float]) -> Monitor:
    """A monitor that has the loss from the beginning on; it measures no layers of the earlier steps."""
    detector = SpikeDetector()
    for step, loss in enumerate(losses):
        detector.update(step, {LOSS: loss})
    return Monitor(loop.model, loop.optimizer, out=folder, every=1, tensorboard=False, detector=detector)


def _step(loop: AtlasLoop, step: int, losses: list[float], states: dict[int, LoopState]) -> None:
    since = step - loop.planted
    if -KEPT <= since <= LATE - BEFORE and since % 2 == 0:
        states[step] = LoopState.of(loop, step)
    if since in HORIZONS:
        loop.measures[step] = measure(loop)
    losses.append(loop.train_step(step))


def _excess(losses: list[float], healthy: Twin, planted: int) -> list[float]:
    return [mine - theirs for mine, theirs in zip(losses[planted:], healthy.losses[planted:], strict=False)]


def _episodes(losses: list[float]) -> list[Episode]:
    """The detector's episodes of the whole loss, value by value."""
    detector = SpikeDetector()
    events = [event for step, loss in enumerate(losses) for event in detector.update(step, {LOSS: loss})]
    return episodes_of([*events, *detector.finish()])


def _told(run: Run, first: int, online: Episode | None) -> Event | None:
    """The run's event of its episode; where it told none, that of signals that left their level without the loss."""
    said = [event for event in run.events if event.kind == "diagnosis"]
    if online is not None:
        return next((event for event in said if event.step == online.onset), None)
    return next((event for event in said if first <= event.step <= first + LATE), None)


def _episode(found: list[Episode], first: int, planted: bool) -> Episode | None:
    late = [
        one
        for one in found
        if one.onset >= first and (not planted or one.onset <= first + LATE) and one.signal == LOSS
    ]
    return late[0] if late else None


def _near(run: Run, onset: int) -> pd.DataFrame:
    parts = []
    for family, statistic in _NEAR:
        rows = run.near(family, statistic, onset - AROUND, onset + AROUND)
        if len(rows):
            parts.append(rows.assign(family=family, statistic=statistic, site=rows["site"].astype(str)))
    found: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return found

"""One run of the atlas: trained, watched, judged by detector, forensics and forks."""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.benchmarks._atlas_loop import AtlasLoop
from experiments.benchmarks._atlas_recipes import Recipe
from experiments.benchmarks.forensics import module_of
from stabilitylab import Monitor
from stabilitylab.attribution import LoopState, attribute
from stabilitylab.runs import load_run
from stabilitylab.spikes import Episode, episodes_of

EVERY, AFTER, AROUND, BEFORE, WATCHED = 8, 20, 24, 6, 12
# Steps before the planted one that a monitor sees.
SEEN = 48
# Emergent recipes: watched from here on, up to there.
FIRST, LAST = 24, 110


def spike(recipe: Recipe, number: int, seed: int, telemetry: Path) -> dict[str, Any]:
    """Train, find the episode, explain it, prove it. ``telemetry`` takes the Parquet around it.

    Returns a row of the atlas; ``onset`` None: the recipe made none.
    """
    planted = 80 + (7 * seed + number) % 16 if recipe.planted else 10**9
    steps = planted + AFTER if recipe.planted else LAST
    loop = AtlasLoop(recipe, seed, planted)
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
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        losses, states = _train(loop, steps, Path(folder) / "run", recipe)
        row["train_seconds"] = time.perf_counter() - began
        run = load_run(Path(folder) / "run")
        one = _episode(episodes_of(run.events), planted if recipe.planted else FIRST, recipe.planted)
        if one is None:
            return row
        told = next((e for e in run.events if e.kind == "diagnosis" and e.step == one.onset), None)
        row |= {
            "onset": one.onset,
            "kind": one.kind,
            "height": one.height,
            "told_at": one.told,
            "forensics": None if told is None else told.data["cause"],
            "forensics_site": None if told is None else module_of(told.data["site"] or ""),
        }
        near = _near(run, one.onset)
        telemetry.parent.mkdir(parents=True, exist_ok=True)
        near.to_parquet(telemetry, index=False, compression="zstd")
    began = time.perf_counter()
    begin = max(step for step in states if step <= max(0, one.onset - BEFORE))
    proof = attribute(
        loop,
        one,
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
        "attribute_seconds": time.perf_counter() - began,
    }
    return row


def _train(
    loop: AtlasLoop, steps: int, folder: Path, recipe: Recipe
) -> tuple[list[float], dict[int, LoopState]]:
    losses: list[float] = []
    states: dict[int, LoopState] = {}
    first = max(0, loop.planted - SEEN) if recipe.planted else 0
    losses += [loop.train_step(step) for step in range(first)]
    with Monitor(loop.model, loop.optimizer, out=folder, every=1, tensorboard=False) as monitor:
        for step in range(first, steps):
            if step % EVERY == 0:
                states[step] = LoopState.of(loop, step)
            losses.append(loop.train_step(step))
            monitor.step(step, loss=losses[-1])
    return losses, states


def _episode(found: list[Episode], first: int, planted: bool) -> Episode | None:
    late = [
        one
        for one in found
        if one.onset >= first and (not planted or one.onset <= first + 10) and one.signal == "train/-/loss"
    ]
    return late[0] if late else None


def _near(run: Any, onset: int) -> pd.DataFrame:
    parts = []
    for family, statistic in (
        ("train", "loss"),
        ("train", "gradient_norm"),
        ("gradient", "l2"),
        ("activation", "absmax"),
        ("activation", "rms"),
        ("attention", "score_max"),
        ("update", "rms"),
        ("update", "rms_t"),
        ("update", "second_moment_l2"),
    ):
        rows = run.near(family, statistic, onset - AROUND, onset + AROUND)
        if len(rows):
            parts.append(rows.assign(family=family, statistic=statistic, site=rows["site"].astype(str)))
    found: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return found

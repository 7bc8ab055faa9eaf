"""How often `stabilitylab forecast` is right: quantizes later checkpoints of the same runs, on text outside training.

    python -m experiments.benchmarks format_forecast [--runs 8] [--steps 1200] [--json]

A GPT of 4 layers of 64 learns the bigrams of a random grammar; rate and decay vary with the seed, so that outliers grow in some
runs and not in others. The benchmark forecasts at a quarter of the run; at half of it and at its end it rounds every linear layer's
input and weight whole, as a quantizer would, on rows outside training. For every operand that had not left a format at the time of
the forecast it asks: has it left now?

    right      share of operands that the forecast answers correctly: left where the whole 90 % interval lies before that step
    covered    share whose answer the 90 % interval allows
    caught     of those that left, the share foretold            false      of those foretold, the share that did not leave
    likely     right, if one goes by the most likely step alone
    persistent share right if one says that nothing changes
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.benchmarks._monitor_arms import GPT, VOCABULARY
from stabilitylab import Monitor, Schedule, load_run
from stabilitylab.forecast import FACTOR, forecast_run
from stabilitylab.formats import FormatWatch, gaussian_error, what_if_format
from stabilitylab.probes.formats import FORMATS, FormatProbe

SHAPE, ROWS, LENGTH, EVERY = (4, 64, 4), 8, 64, 5
SEEN, LATER = 0.25, (0.5, 1.0)


def one_run(seed: int, steps: int) -> list[dict[str, Any]]:
    """Every operand that had not left its format at the forecast, at each later checkpoint."""
    torch.manual_seed(seed)
    dice = np.random.default_rng(seed)
    rate = float(np.exp(dice.uniform(np.log(1e-3), np.log(3e-2))))
    model = GPT(*SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=float(dice.choice([0.0, 0.1])))
    text = _grammar(seed)
    checkpoints = {round(share * steps) for share in LATER}
    seen = round(SEEN * steps)
    truth: dict[int, dict[tuple[str, str], float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        schedule = Schedule(every=0, probes={"formats": EVERY}, dense_steps=0)
        with Monitor(
            model,
            optimizer,
            out=out,
            schedule=schedule,
            probes=[FormatProbe()],
            detector=None,
            tensorboard=False,
        ) as monitor:
            for step in range(steps + 1):
                loss = _loss(model, next(text))
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                monitor.step(step, loss=loss)
                if step in checkpoints:
                    truth[step] = _quantized(model, seed)
        found = forecast_run(load_run(out), seen=seen)
    assert found is not None
    rows = []
    for one in found.layers:
        if one.has_left or one.site.endswith(":gradient"):
            continue
        for step, errors in truth.items():
            has_left = errors[one.site, one.format] >= FACTOR * gaussian_error(what_if_format(one.format))
            rows.append(
                {
                    "seed": seed,
                    "site": one.site,
                    "format": one.format,
                    "ahead": step / seen,
                    "left": has_left,
                    "foretold": one.latest <= step,
                    "likely": one.likely <= step,
                    "covered": one.earliest <= step if has_left else one.latest > step,
                }
            )
    return rows


def _quantized(model: nn.Module, seed: int) -> dict[tuple[str, str], float]:
    """The error of every operand in every format, rounded whole, on rows outside training."""
    with torch.no_grad(), FormatWatch(model, FORMATS) as watch:
        model(next(_grammar(seed, fresh=True))[:, :-1])
    return {(f"{path}:{operand}", name): one.error for (path, operand, name), one in watch.errors().items()}


def _grammar(seed: int, *, fresh: bool = False) -> Iterator[Tensor]:
    """Batches of a Markov chain whose every token has four successors."""
    rules = np.random.default_rng(seed).integers(0, VOCABULARY, (VOCABULARY, 4))
    dice = np.random.default_rng((seed, fresh))
    while True:
        rows = np.zeros((ROWS, LENGTH + 1), dtype=np.int64)
        rows[:, 0] = dice.integers(0, VOCABULARY, ROWS)
        picks = np.minimum(dice.geometric(0.5, (ROWS, LENGTH)) - 1, 3)
        for t in range(LENGTH):
            rows[:, t + 1] = rules[rows[:, t], picks[:, t]]
        yield torch.from_numpy(rows)


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def scores(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """See the head of the module."""
    left, foretold = (np.array([row[name] for row in rows]) for name in ("left", "foretold"))
    share = {
        "operands": float(len(rows)),
        "right": float((left == foretold).mean()),
        "likely": float(np.mean([row["likely"] == row["left"] for row in rows])),
        "covered": float(np.mean([row["covered"] for row in rows])),
        "left": float(left.mean()),
        "persistent": float((~left).mean()),
    }
    share["caught"] = float(foretold[left].mean()) if left.any() else float("nan")
    share["false"] = float((~left[foretold]).mean()) if foretold.any() else float("nan")
    return share


def main(argv: Sequence[str]) -> int:
    """Train, forecast, quantize later, score; prints a line for each run that ends."""
    parser = argparse.ArgumentParser(prog="experiments.benchmarks format_forecast")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(asked.runs):
        rows += one_run(seed, asked.steps)
        told = {
            f"{name}, {ahead:g} x": scores(chosen)
            for name in (*FORMATS, "all")
            for ahead in (LATER[0] / SEEN, LATER[1] / SEEN)
            if (chosen := [r for r in rows if name in (r["format"], "all") and r["ahead"] == ahead])
        }
        print(json.dumps(told) if asked.json else _text(seed + 1, told), flush=True)
    return 0


def _text(runs: int, told: dict[str, dict[str, float]]) -> str:
    lines = [f"after {runs} runs"]
    lines += [
        f"  {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in of.items())
        for name, of in told.items()
    ]
    return "\n".join(lines)

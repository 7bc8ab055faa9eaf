"""One unstable model, and each remedy alone: what it gains, and what it costs.

The baseline is pre-LN with scores and softmax in the compute format, 4 layers of 32 over rows of 32 tokens, 72 updates, 20 of
warm-up: some 10 ms an update. Every arm and seed runs at the same two rates, which all arms survive, and its numbers are those at
the better of the two. Bisection on quarters of an octave finds its frontier (a lost run ends within a few updates, so a search
costs little more than the runs that survive):

    frontier    log2 of the largest rate survived            heldout     least held-out loss over the two rates
    score       largest attention score on held-out rows     branch      largest |residual stream| there
    outlier     largest channel over the median one, of      outliers    share of channels over three times the median
                the worst layer                                          one, of the worst layer
    four_bit    held-out loss with MXFP4 weights less that   step_ms     processor time of an update, median
                with its own

Thresholds fit the size: scores of a model of 32 are some tens, so QK-clip and the soft cap stand at 20; AdaGC begins after 15
updates (100 published), and skip-step acts from its 64th value on, as published: for the last 8 updates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.arm import Arm
from experiments.outcomes import at_best_rate
from experiments.study import Cell, Outcome
from experiments.suites._proxy import PROXY
from experiments.trial import Trial, frontier, heldout_loss, trial
from experiments.verdicts import Claim
from glm.model.attention import Scores
from glm.train.loop import Trainer
from stabilitylab.formats import fake_quantize

SETTINGS = {
    **PROXY,
    "model.length": "32",
    "steps": "72",
    "model.norm": "pre",
    "model.attention.softmax": "compute",
}
BORNE = (-6.5, -4.5)
BASELINE = "nothing"

REMEDIES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    BASELINE: ("pre-LN, softmax in the compute format", {}),
    "egs": ("embedding gradient x .1", {"model.embedding.gradient-shrink": "0.1"}),
    "embedding-norm": ("norm after the look-up", {"model.embedding.norm": ""}),
    "deepnorm": ("DeepNorm", {"model.norm": "deepnorm"}),
    "sandwich": ("sandwich", {"model.norm": "sandwich"}),
    "reordered": ("reordered norm", {"model.norm": "reordered"}),
    "qk-norm": ("norm of queries and keys", {"model.attention.qk-norm": ""}),
    "qk-clip": ("QK-clip at 20", {"model.attention.qk-clip": "20"}),
    "soft-cap": ("soft cap of scores at 20", {"model.attention.soft-cap": "20"}),
    "gate": ("output gated by element", {"model.attention.gate": "element"}),
    "sink": ("learned sinks", {"model.attention.sink": "learned"}),
    "z-loss": ("z-loss 1e-4", {"model.z-loss": "1e-4"}),
    "pb-relax": ("PB-Relax, a = 32", {"model.attention.softmax": "pb-relax"}),
    "adagc": ("AdaGC", {"optimizer.guard.adagc": "", "optimizer.guard.warmup": "15"}),
    "spam": ("SPAM", {"optimizer.guard.spam": "spam"}),
    "zclip": ("ZClip", {"optimizer.zclip": ""}),
    "stable-adamw": ("StableAdamW", {"optimizer.update-clipping": ""}),
    "skip-step": ("skip-step at 6 deviations", {"optimizer.guard.skip-step": "6"}),
    "beta2": ("beta2 .9 instead of .95", {"optimizer.beta2": "0.9"}),
    "warmup": ("warm-up of 60 updates instead of 20", {"schedule.warmup": "60"}),
    "muon": ("Muon", {"optimizer.kind": "muon"}),
    "muon-qk-clip": ("Muon, QK-clip at 20", {"optimizer.kind": "muon", "model.attention.qk-clip": "20"}),
}
ARMS = tuple(Arm(name=name, summary=text, settings=flags) for name, (text, flags) in REMEDIES.items())

OUTCOMES = {
    "frontier": Outcome(title="Largest rate survived, log2", margin=0.5, unit="octaves"),
    "heldout": Outcome(title="Held-out loss at the best rate", margin=0.03, unit="nats"),
    "score": Outcome(title="Largest attention score", margin=0.2, scale="log"),
    "branch": Outcome(title="Largest value of the residual stream", margin=0.2, scale="log"),
    "outlier": Outcome(title="Largest channel / median channel", margin=0.1, scale="log"),
    "outliers": Outcome(
        title="Channels over three times the median one", margin=0.02, unit="share of channels"
    ),
    "four_bit": Outcome(title="Loss added by MXFP4 weights", margin=0.01, unit="nats"),
    "step_ms": Outcome(title="Processor time of an update, ms", margin=0.1, scale="log"),
}


def claims(precision: str) -> tuple[Claim, ...]:
    """Each remedy raises the rate that is survived."""
    return tuple(
        Claim(
            text=f"{text[0].upper()}{text[1:]} raises the rate that is survived, {precision}",
            metric="frontier",
            arm=name,
            baseline=BASELINE,
            direction="more",
            source="docs/techniques.md",
        )
        for name, (text, _) in REMEDIES.items()
        if name != BASELINE
    )


def quarters(first: int, last: int) -> tuple[float, ...]:
    """A grid of rates, log2, between two whole octaves."""
    return tuple(quarter / 4 for quarter in range(4 * first, 4 * last))


def measure_over(grid: Sequence[float], cell: Cell) -> Mapping[str, float]:
    """A cell's numbers, the frontier on ``grid`` (log2 of rates)."""
    found = frontier(lambda rate: trial(cell.config, data=cell.data, rate=rate, heldout=False), grid)
    marks: list[float] = []
    taken: list[float] = []
    runs: dict[float, Trial] = {}
    for rate in BORNE:
        marks.clear()
        runs[rate] = trial(
            cell.config,
            data=cell.data,
            rate=2.0**rate,
            every=lambda trainer, step: marks.append(time.process_time()),
        )
        taken += [after - before for before, after in pairwise(marks)]
    best, loss = at_best_rate({rate: one.heldout for rate, one in runs.items()})
    values = {"frontier": found, "heldout": loss, "step_ms": 1000 * statistics.median(taken)}
    if best not in runs:  # no run survived: there is no model to look at
        return values
    return {**values, "best_rate": best, **after(runs[best].trainer, cell.data, loss)}


@torch.no_grad()
def after(trainer: Trainer, data: Path, heldout: float) -> dict[str, float]:
    """What the trained model's activations are like, and what 4-bit weights cost it."""
    scores: list[float] = []
    ratios: list[float] = []
    shares: list[float] = []
    largest: list[float] = []

    def see_scores(module: nn.Module, given: Any, out: Tensor) -> None:
        scores.append(float(out.float().nan_to_num(0.0, 0.0, 0.0).amax()))

    def see_stream(module: nn.Module, given: Any, out: Tensor) -> None:
        channels = out.float().abs().flatten(0, -2).amax(0)
        largest.append(float(channels.amax()))
        times = channels / channels.median().clamp_min(1e-30)
        ratios.append(float(times.amax()))
        shares.append(float((times > 3).float().mean()))

    model = trainer.engine.model
    layers = [m for name, m in model.named_modules() if name.startswith("layers.") and name.count(".") == 1]
    handles = [m.register_forward_hook(see_scores) for m in model.modules() if isinstance(m, Scores)]
    handles += [m.register_forward_hook(see_stream) for m in layers]
    try:
        heldout_loss(trainer, data)
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in model.named_parameters():
        if name.startswith("layers.") and parameter.dim() == 2:
            parameter.copy_(fake_quantize(parameter, "mxfp4"))
    return {
        "score": max(scores),
        "branch": max(largest),
        "outlier": max(ratios),
        "outliers": max(shares),
        "four_bit": heldout_loss(trainer, data) - heldout,
    }

"""One unstable model, and each remedy alone: what it is worth, and what it costs.

The baseline is pre-LN with scores and softmax in the compute format, 4 layers of 32 (``_proxy``), 96 updates, 20 of warm-up. A cell
finds the largest rate of a grid of octaves that survives, measures the held-out loss there and at two rates that all bear, and at
the best of them:

    frontier    log2 of the largest rate survived            heldout     least held-out loss over the rates tried
    score       largest attention score on held-out rows     branch      largest |residual stream| there
    outlier     largest channel over the median one, of      four_bit    held-out loss with MXFP4 weights less that with
                the worst layer                                          its own
    step_ms     processor time of an update

Thresholds fit the size: scores of a model of 32 are some tens, so QK-clip and the soft cap stand at 20; AdaGC begins after 30
updates (100 published) and skip-step at its 64th value.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.arm import Arm
from experiments.study import Cell, Outcome
from experiments.suites._proxy import PROXY
from experiments.trial import Trial, frontier, heldout_loss, trial
from experiments.verdicts import Claim
from glm.model.attention import Scores
from glm.train.loop import Trainer
from stabilitylab.formats import fake_quantize

SETTINGS = {**PROXY, "steps": "96", "model.norm": "pre", "model.attention.softmax": "compute"}
BORNE = (2.0**-7, 2.0**-6)
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
    "adagc": ("AdaGC", {"optimizer.guard.adagc": "", "optimizer.guard.warmup": "30"}),
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
    "frontier": Outcome(title="Largest rate survived, log2", margin=0.5, unit="octaves", scale="rank"),
    "heldout": Outcome(title="Held-out loss at the best rate", margin=0.03, unit="nats"),
    "score": Outcome(title="Largest attention score", margin=0.2, scale="log"),
    "branch": Outcome(title="Largest value of the residual stream", margin=0.2, scale="log"),
    "outlier": Outcome(title="Largest channel / median channel", margin=0.1, scale="log"),
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


def measure_over(grid: Sequence[float], cell: Cell) -> Mapping[str, float]:
    """A cell's numbers, the frontier on ``grid`` (log2 of rates)."""
    tried: list[Trial] = []

    def at(rate: float) -> Trial:
        tried.append(trial(cell.config, data=cell.data, rate=rate))
        return tried[-1]

    found = frontier(at, grid)
    begun = time.process_time()
    steps = 0
    for rate in BORNE:
        steps += len(at(rate).loss)
    seconds = time.process_time() - begun
    best = min(tried, key=lambda one: one.heldout if math.isfinite(one.heldout) else math.inf)
    return {
        "frontier": found,
        "heldout": best.heldout,
        "best_rate": math.log2(best.config.schedule.peak),
        **after(best.trainer, cell.data, best.heldout),
        "step_ms": 1000 * seconds / max(1, steps),
    }


@torch.no_grad()
def after(trainer: Trainer, data: Path, heldout: float) -> dict[str, float]:
    """What the trained model's activations are like, and what 4-bit weights cost it."""
    scores: list[float] = []
    ratios: list[float] = []
    largest: list[float] = []

    def see_scores(module: nn.Module, given: Any, out: Tensor) -> None:
        scores.append(float(out.float().nan_to_num(0.0, 0.0, 0.0).amax()))

    def see_stream(module: nn.Module, given: Any, out: Tensor) -> None:
        channels = out.float().abs().flatten(0, -2).amax(0)
        largest.append(float(channels.amax()))
        ratios.append(float(channels.amax() / channels.median().clamp_min(1e-30)))

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
        "four_bit": heldout_loss(trainer, data) - heldout,
    }

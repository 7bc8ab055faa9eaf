"""C9 and C10. GLM's recipe against GPT's: outliers by named criterion, and what 4-bit weights cost.

GLM-130B found outliers in about 30 % of the dimensions where OPT and BLOOM have .1 %, without a threshold, and took 4-bit weights
(one scale a row, activations whole) without loss where BLOOM-176B's answers became NaN. Both recipes train for 150 steps on the
same text, then read the same 16 held-out rows of their own objective. Criteria are those of ``stabilitylab.outliers.criteria``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import NEXT_TOKEN, PROXY, proxy_text
from experiments.trial import heldout_loss, heldout_rows, trial
from experiments.verdicts import Claim
from glm.train.config import TrainConfig
from stabilitylab.outliers.criteria import CRITERIA
from stabilitylab.outliers.scan import ChannelWatch
from stabilitylab.quantization.replacement import quantizable_layers, quantized, replaced
from stabilitylab.quantization.scheme import Scheme

SCHEMES = ("int4-row", "int8-row")
JUDGED = ("over-6", "3x-median", "values-6-sigma")


@torch.no_grad()
def shares(cell: Cell, model: torch.nn.Module) -> dict[str, float]:
    """The share that each criterion marks, over the inputs of linear layers."""
    batch = heldout_rows(cell.data, TrainConfig(objective=cell.config.objective, model=cell.config.model))
    model.eval()
    with ChannelWatch(model) as watch:
        model.hidden(  # type: ignore[operator]
            batch.tokens_BT[:16], batch.positions[:16], batch.segments_BT[:16], batch.context_BT[:16]
        )
        watch.next_window()
        seen = [(site, one) for site, one in watch.seen() if site.is_input]
    model.train()
    return {f"share_{criterion.name}": criterion.measure(seen).share or 0.0 for criterion in CRITERIA}


def measure(cell: Cell) -> Mapping[str, float]:
    run = trial(cell.config, data=cell.data)
    model = run.trainer.engine.model
    values = {"heldout": run.heldout, **shares(cell, model)}
    layers = {path: layer for path, layer in quantizable_layers(model).items() if path.startswith("layers.")}
    for name in SCHEMES:
        made = {path: quantized(path, layer, Scheme.parse(name)) for path, layer in layers.items()}
        with replaced(model, made):
            values[f"loss_{name}"] = heldout_loss(run.trainer, cell.data) - run.heldout
    return values


STUDY = Study(
    name="recipes",
    question="Does GLM's recipe have more outliers than GPT's, by which criterion, and which bears 4-bit weights better?",
    arms=(
        Arm(name="glm", summary="DeepNorm, RoPE, GeGLU, Xavier, blank infilling"),
        Arm(
            name="gpt",
            summary="pre-LN, learned positions, GELU, GPT-2's initial weights, next token",
            settings={
                **NEXT_TOKEN,
                "model.norm": "pre",
                "model.init": "gpt2",
                "model.attention.positions": "learned",
                "model.feed-forward.kind": "gelu",
            },
        ),
    ),
    seeds=10,
    settings={**PROXY, "model.hidden": "64", "steps": "150", "schedule.peak": "4e-3"},
    data=proxy_text,
    measure=measure,
    outcomes={
        **{f"share_{name}": Outcome(title=f"Marked by {name}", margin=0.02, unit="share") for name in JUDGED},
        "loss_int4-row": Outcome(title="Loss that int4 costs", margin=0.01, unit="nats"),
    },
    claims=(
        *(
            Claim(
                text=f"C9 GLM's recipe has more outliers than GPT's, by {name}",
                metric=f"share_{name}",
                arm="glm",
                baseline="gpt",
                direction="more",
            )
            for name in JUDGED
        ),
        Claim(
            text="C10 4-bit weights cost GLM's recipe less than GPT's",
            metric="loss_int4-row",
            arm="glm",
            baseline="gpt",
        ),
    ),
    predictions=(
        "2026-11-29, before the runs: more by over-6 (an absolute threshold, and DeepNorm's inputs are wider), open by the "
        "others; int4 "
        "costs GLM's recipe more, not less: beta makes some of its weights small beside others of a row.",
    ),
)

"""Does Muon with a norm of one gain train a model without outliers, and does that pay in 4 bits?

Park et al. (Outlier-Safe Pre-Training, 2506.19697, table 2) trained 1.4B models on a trillion tokens: with AdamW the excess
kurtosis of activations ended at 1,818 and the mean 4-bit score at 26.5; with Muon, RMSNorm of a single gain and a projection after
the embedding at .04 and 35.7. This study crosses the two parts that are levers here at the smallest size, next token, 250 updates:
it asks for the direction of the effect, not its size. Muon's update has AdamW's root mean square, so one rate serves all.

    kurtosis    excess kurtosis (Gaussian: 0) of what enters a block's linear layers after a norm: mean over layers, held-out rows
    stream      the same of the residual stream behind the last block
    int4        held-out loss with int4 weights of blocks, one scale a row, less that with the weights themselves
    four_bit    the same with weights and activations in MXFP4
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import NEXT_TOKEN, PROXY, proxy_text
from experiments.trial import heldout_loss, trial
from experiments.verdicts import Claim
from stabilitylab.quantization.replacement import quantizable_layers, quantized, replaced
from stabilitylab.quantization.schemes import scheme_of

SCHEMES = {"int4": "int4-row", "four_bit": "mxfp4/mxfp4"}
ENTRIES = ("attention.query_key_value", "feed_forward.up")
SOURCE = "Park et al. (2506.19697)"
MUON, SINGLE = {"optimizer.kind": "muon"}, {"model.norm-kind": "rms-single"}


def excess_kurtosis(x: Tensor) -> float:
    """m4 / m2^2 - 3 of all elements."""
    centred = x.double() - x.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean().square() - 3)


def measure(cell: Cell) -> Mapping[str, float]:
    run = trial(cell.config, data=cell.data)
    model = run.trainer.engine.model
    entering: list[float] = []
    stream: list[float] = []

    def see(kept: list[float], x: Tensor) -> None:
        kept.append(excess_kurtosis(x))

    def entry(module: nn.Module, given: tuple[Any, ...]) -> None:
        see(entering, given[0])

    def leaving(module: nn.Module, given: Any, out: Tensor) -> None:
        see(stream, out)

    last = model.get_submodule(f"layers.{cell.config.model.layers - 1}")
    handles = [
        m.register_forward_pre_hook(entry) for name, m in model.named_modules() if name.endswith(ENTRIES)
    ]
    handles.append(last.register_forward_hook(leaving))
    try:
        heldout_loss(run.trainer, cell.data)
    finally:
        for handle in handles:
            handle.remove()
    values = {
        "heldout": run.heldout,
        "kurtosis": sum(entering) / len(entering),
        "stream": sum(stream) / len(stream),
    }
    layers = {path: layer for path, layer in quantizable_layers(model).items() if path.startswith("layers.")}
    for outcome, name in SCHEMES.items():
        with (
            torch.no_grad(),
            replaced(model, {p: quantized(p, one, scheme_of(name)) for p, one in layers.items()}),
        ):
            values[outcome] = heldout_loss(run.trainer, cell.data) - run.heldout
    return values


def _less(text: str, metric: str, arm: str, baseline: str) -> Claim:
    return Claim(text=text, metric=metric, arm=arm, baseline=baseline, source=SOURCE)


STUDY = Study(
    name="outlier-safe",
    question="Do Muon and a norm of a single gain, alone and together, keep outliers out, and is 4 bits cheaper for it?",
    arms=(
        Arm(name="adam", summary="AdamW, RMSNorm with a gain a channel"),
        Arm(name="adam-single", summary="AdamW, RMSNorm with one gain", settings=SINGLE),
        Arm(name="muon", summary="Muon, RMSNorm with a gain a channel", settings=MUON),
        Arm(name="muon-single", summary="Muon, RMSNorm with one gain", settings={**MUON, **SINGLE}),
    ),
    seeds=12,
    settings={
        **PROXY,
        **NEXT_TOKEN,
        "model.hidden": "64",
        "model.length": "32",
        "model.norm": "pre",
        "model.norm-kind": "rms",
        "model.init": "gpt2",
        "steps": "250",
        "schedule.peak": "4e-3",
    },
    data=proxy_text,
    measure=measure,
    outcomes={
        "heldout": Outcome(title="Held-out loss", margin=0.02, unit="nats"),
        "kurtosis": Outcome(title="Excess kurtosis where a norm leads into a linear layer", margin=0.1),
        "stream": Outcome(title="Excess kurtosis of the last residual stream", margin=0.1),
        "int4": Outcome(title="Loss added by int4 weights", margin=0.005, unit="nats"),
        "four_bit": Outcome(title="Loss added by MXFP4 weights and activations", margin=0.005, unit="nats"),
    },
    claims=(
        *(
            _less(
                f"Muon with one gain has less {words} than AdamW with a gain a channel",
                metric,
                "muon-single",
                "adam",
            )
            for metric, words in (
                ("kurtosis", "kurtosis"),
                ("stream", "kurtosis of the residual stream"),
                ("int4", "loss by int4 weights"),
                ("four_bit", "loss by 4-bit weights and activations"),
                ("heldout", "held-out loss"),
            )
        ),
        _less("Muon alone has less kurtosis than AdamW", "kurtosis", "muon", "adam"),
        _less("One gain alone lowers AdamW's kurtosis", "kurtosis", "adam-single", "adam"),
        _less("One gain lowers Muon's kurtosis", "kurtosis", "muon-single", "muon"),
    ),
    predictions=(
        "2026-11-29, before the runs (seed 0 of adam and muon-single was seen): kurtosis is below a Gaussian's in all arms, so "
        "that there are no outliers to be kept out, and the arms differ by less than the margin; 4-bit losses are some hundredths "
        "of a nat at most, and Muon's are the higher ones: against the published direction.",
    ),
)

"""Depth as a cause: at one rate four layers of DeepNorm train, do twenty-four, and what cures them?

A deep model does not explode here: it stays at the loss of a model that knows only the pieces' frequencies (5.2 nats). So the study
compares the held-out loss at the end, and records the largest gradient norm on the way. Cures: a quarter of the rate; pre-LN that
divides its outputs by the root of the layer's number (``pre-scaled``).

Explored with seeds 1 and 2 (RESULTS.md, *Proxies*); the study's seeds are others.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import NEXT_TOKEN, PROXY, proxy_text
from experiments.trial import trial
from experiments.verdicts import Claim


def measure(cell: Cell) -> Mapping[str, float]:
    run = trial(cell.config, data=cell.data)
    return {"heldout": run.heldout, "norm": float(run.norm.max()), "highest": float(run.loss.max())}


def _arm(name: str, summary: str, norm: str, layers: int, log2_rate: int) -> Arm:
    settings = {"model.norm": norm, "model.layers": str(layers), "schedule.peak": str(2.0**log2_rate)}
    return Arm(name=name, summary=summary, settings=settings)


STUDY = Study(
    name="depth-cause",
    question="Does depth alone end a run that trains when shallow, and what cures it?",
    arms=(
        _arm("shallow", "DeepNorm, 4 layers, rate 2^-6", "deepnorm", 4, -6),
        _arm("deep", "DeepNorm, 24 layers, rate 2^-6", "deepnorm", 24, -6),
        _arm("deep-slow", "DeepNorm, 24 layers, rate 2^-8", "deepnorm", 24, -8),
        _arm("deep-scaled", "pre-LN scaled by depth, 24 layers, rate 2^-6", "pre-scaled", 24, -6),
    ),
    seeds=12,
    first=11,
    settings={
        **PROXY,
        **NEXT_TOKEN,
        "model.heads": "2",
        "model.length": "32",
        "schedule.warmup": "5",
    },
    data=proxy_text,
    measure=measure,
    outcomes={
        "heldout": Outcome(title="Held-out loss at the end", margin=0.1, unit="nats"),
        "norm": Outcome(title="Largest gradient norm", margin=0.2, scale="log"),
        "highest": Outcome(title="Largest loss on the way", margin=0.1, unit="nats"),
    },
    claims=(
        Claim(text="At one rate 24 layers end higher than 4", metric="heldout", arm="deep", baseline="shallow", direction="more"),
        Claim(text="On the way their gradient spikes higher", metric="norm", arm="deep", baseline="shallow", direction="more"),
        Claim(text="A quarter of the rate cures 24 layers", metric="heldout", arm="deep-slow", baseline="deep"),
        Claim(text="Pre-LN scaled by depth cures 24 layers", metric="heldout", arm="deep-scaled", baseline="deep"),
    ),
    predictions=(
        "2026-11-29, before the study's runs, after a seed or two of each norm: the first three supported, by .5 nats and more, a "
        "factor of two, and .2 nats; the fourth supported or undecided (one of two seeds trained).",
    ),
)  # fmt: skip

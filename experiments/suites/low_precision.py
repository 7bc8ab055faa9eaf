"""Which of a block's products bear which low format, and do the known cures mend those that do not?

Operands of linear layers are rounded by emulation (``glm.train.emulation``), everything else is fp32; seed by seed the runs have
the same weights and batches, so that what a format costs is a difference of held-out losses. 4 layers of 64, 80 updates. Asked are:

    recipe      what a whole recipe costs: FP8 a tensor, FP8 in blocks, MXFP8, MXFP4, NVFP4
    product     MXFP4, rounded to nearest, in the forward product alone, in both backward ones, in each of those
    kind        the same in all products of one kind of layer
    cure        stochastic rounding of gradients, random Hadamard, FP8 gradients, the last block spared (2502.20586, 2509.25149)
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import PROXY, proxy_text
from experiments.trial import trial
from experiments.verdicts import Claim

WHOLE = "fp32"
RECIPES = {
    "fp8": "FP8 with a scale a tensor",
    "fp8-blocks": "FP8 in tiles and blocks of 128",
    "mxfp8": "MXFP8",
    "mxfp4": "MXFP4 with its cure",
    "nvfp4": "NVFP4 with its cures",
}
PLAIN = {"emulate.stochastic": "False", "emulate.hadamard": "False"}
MXFP4 = {"emulate.recipe": "mxfp4", **PLAIN}
NVFP4 = {"emulate.recipe": "nvfp4", **PLAIN}
PRODUCTS = {
    "forward": "forward",
    "backward": "grad-input,grad-weight",
    "grad-input": "grad-input",
    "grad-weight": "grad-weight",
}
KINDS = {
    "query-key-value": "layers.*.attention.query_key_value",
    "output": "layers.*.attention.output",
    "up": "layers.*.feed_forward.up",
    "down": "layers.*.feed_forward.down",
}
CURES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "mxfp4-hadamard": ("MXFP4, weight gradients rotated", {**MXFP4, "emulate.hadamard": "True"}),
    "mxfp4-fp8-gradients": ("MXFP4 with MXFP8 gradients", {**MXFP4, "emulate.gradients": "mxfp8-e4m3"}),
    "mxfp4-last-spared": ("MXFP4, last block spared", {**MXFP4, "emulate.spared": "layers.3.*"}),
    "nvfp4-stochastic": ("NVFP4, stochastic gradients", {**NVFP4, "emulate.stochastic": "True"}),
    "nvfp4-hadamard": ("NVFP4, weight gradients rotated", {**NVFP4, "emulate.hadamard": "True"}),
}


def measure(cell: Cell) -> Mapping[str, float]:
    return {"heldout": trial(cell.config, data=cell.data).heldout}


def _claim(text: str, arm: str, baseline: str, *, more: bool = False, source: str = "2509.25149") -> Claim:
    return Claim(
        text=text,
        metric="heldout",
        arm=arm,
        baseline=baseline,
        direction="more" if more else "less",
        source=source,
    )


STUDY = Study(
    name="low-precision",
    question="Which products and layers bear which low format in training, and what do the known cures mend?",
    arms=(
        Arm(name=WHOLE, summary="nothing rounded"),
        *(Arm(name=name, summary=text, settings={"emulate.recipe": name}) for name, text in RECIPES.items()),
        Arm(name="mxfp4-plain", summary="MXFP4 to nearest", settings=MXFP4),
        Arm(name="nvfp4-plain", summary="NVFP4 to nearest", settings=NVFP4),
        *(
            Arm(
                name=f"mxfp4-{name}",
                summary=f"MXFP4 in {which}",
                settings={**MXFP4, "emulate.products": which},
            )
            for name, which in PRODUCTS.items()
        ),
        *(
            Arm(name=f"mxfp4-{name}", summary=f"MXFP4 in {sites}", settings={**MXFP4, "emulate.sites": sites})
            for name, sites in KINDS.items()
        ),
        *(Arm(name=name, summary=text, settings=settings) for name, (text, settings) in CURES.items()),
    ),
    seeds=12,
    settings={
        **PROXY,
        "model.hidden": "64",
        "model.length": "32",
        "model.norm": "pre",
        "steps": "80",
        "schedule.peak": "1e-2",
    },
    data=proxy_text,
    measure=measure,
    outcomes={"heldout": Outcome(title="Held-out loss", margin=0.01, unit="nats")},
    claims=(
        *(_claim(f"{text} costs loss", name, WHOLE, more=True) for name, text in RECIPES.items()),
        _claim("MXFP4 to nearest costs loss", "mxfp4-plain", WHOLE, more=True),
        _claim("NVFP4 to nearest costs loss", "nvfp4-plain", WHOLE, more=True),
        _claim("MXFP4 costs more backward than forward", "mxfp4-backward", "mxfp4-forward", more=True),
        _claim(
            "MXFP4 costs more in weight gradients than in input gradients",
            "mxfp4-grad-weight",
            "mxfp4-grad-input",
            more=True,
        ),
        *(
            _claim(
                f"MXFP4 costs more in {kind} than in queries, keys and values",
                f"mxfp4-{kind}",
                "mxfp4-query-key-value",
                more=True,
            )
            for kind in KINDS
            if kind != "query-key-value"
        ),
        _claim("Stochastic gradients mend MXFP4", "mxfp4", "mxfp4-plain", source="2502.20586"),
        *(
            _claim(f"{text}: mends it", name, f"{name.partition('-')[0]}-plain")
            for name, (text, _) in CURES.items()
        ),
        _claim("Both cures mend NVFP4", "nvfp4", "nvfp4-plain"),
    ),
    predictions=(
        "2026-11-29, before the runs (seed 0 of six arms was seen): all FP8 recipes within .01 nats of fp32; 4-bit ones cost .02 "
        "to .1, MXFP4 more than NVFP4; forward costs more than backward; the down projection most among the kinds. In 80 updates "
        "stochastic rounding, which pays off in the long run, costs rather than mends; the Hadamard rotation does nothing that "
        "shows.",
    ),
)

"""C4, first half. The residual stream ("main branch") against depth, at initialisation: 100 seeds, depths 6 to 96, and theory.

With x_l the residual stream after layer l of L and branches of unit variance (Xavier, inputs normalised):

    pre, sandwich   Var x_l = Var x_0 + 2 l                    max|x| ~ l^.5 within a model, L^.5 over depth  (2002.04745)
    deepnorm        x = alpha N(x) + A, alpha = (2L)^.5        ~ l^0 within a model, but L^.5 over depth: alpha itself grows
    deepnet         the same, alpha = (2L)^.25                 l^0, L^.25                                     (2203.00555)
    post            x = N(x + A)                               l^0, L^0

So "bounded" means bounded by alpha in every layer; it does not mean independent of depth. Exponents are least-squares slopes of
logarithms: over the last layers of the five depths, and over layers l >= 8 of the deepest model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._proxy import PROXY, proxy_text
from experiments.verdicts import Claim
from glm.train.engine import LocalEngine

DEPTHS = (6, 12, 24, 48, 96)
TOKENS = 32
FIRST_LAYER = 8


@torch.no_grad()
def branch(cell: Cell, layers: int) -> np.ndarray:
    """Largest |x| after each layer of a fresh model, over random tokens that the seed determines."""
    config = replace(cell.config.model, layers=layers)
    model = LocalEngine(replace(cell.config, model=config)).model.eval()
    generator = torch.Generator().manual_seed(cell.seed)
    tokens_BT = torch.randint(config.vocabulary or 2, (1, TOKENS), generator=generator)
    positions_BT = torch.arange(TOKENS).expand(1, -1)
    visible_B1TS = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]
    x_BTC = model.embed(tokens_BT, positions_BT)
    bias, turned = model.surroundings(positions_BT, visible_B1TS, x_BTC.dtype)
    largest = []
    for layer in model.layers:
        x_BTC = layer(x_BTC, bias, turned)
        largest.append(x_BTC.abs().max())
    return torch.stack(largest).numpy()


def slope(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measure(cell: Cell) -> Mapping[str, float]:
    branches = {layers: branch(cell, layers) for layers in DEPTHS}
    last = np.array([branches[layers][-1] for layers in DEPTHS])
    deepest = branches[DEPTHS[-1]]
    layers = np.arange(1, len(deepest) + 1)
    return {
        "over_depth": slope(np.array(DEPTHS), last),
        "over_layers": slope(layers[FIRST_LAYER - 1 :], deepest[FIRST_LAYER - 1 :]),
        **{f"max_{depth}": float(value) for depth, value in zip(DEPTHS, last, strict=True)},
    }


NORMS = {
    "pre": "pre-LN",
    "sandwich": "Sandwich-LN",
    "deepnorm": "DeepNorm",
    "deepnet": "DeepNet",
    "post": "post-LN",
}

STUDY = Study(
    name="depth-init",
    question="How does the main branch of a fresh model grow with layers and with depth, under each norm?",
    arms=tuple(Arm(name=norm, summary=said, settings={"model.norm": norm}) for norm, said in NORMS.items()),
    seeds=100,
    settings=PROXY,
    data=proxy_text,
    measure=measure,
    outcomes={
        "over_layers": Outcome(title="Exponent over layers", margin=0.1),
        "over_depth": Outcome(title="Exponent over depth", margin=0.1),
    },
    claims=(
        Claim(
            text="C4 Within a deep model DeepNorm's main branch grows less than pre-LN's (initial weights)",
            metric="over_layers",
            arm="deepnorm",
            baseline="pre",
        ),
        Claim(
            text="C4 Over depth DeepNorm's main branch grows less than pre-LN's (initial weights)",
            metric="over_depth",
            arm="deepnorm",
            baseline="pre",
        ),
        Claim(
            text="C4 Over depth post-LN's main branch grows less than DeepNorm's (initial weights)",
            metric="over_depth",
            arm="post",
            baseline="deepnorm",
        ),
    ),
    predictions=(
        "2026-11-29, before the runs: exponents over layers .5, .5, 0, 0, 0 and over depth .5, .5, .5, .25, 0 (pre, sandwich, "
        "DeepNorm, "
        "DeepNet, post): DeepNorm is bounded within a model, and no better than pre-LN over depth.",
    ),
)

"""Widths and depths between which a learning rate carries over: muP and CompleteP.

With m = hidden / base hidden and l = layers / base layers, under AdamW:

    | | standard | mup | complete-p |
    | --- | --- | --- | --- |
    | hidden matrices: deviation | as drawn | drawn / sqrt(m) | the same |
    | hidden matrices: rate, decay | rate, decay | rate / m, decay m | rate / m, decay m |
    | final hidden states before the output projection | x | x / m | x / m |
    | residual branches | A(x) | A(x) | A(x) / l |
    | embedding, output projection, norms, biases: rate | rate | rate | rate |

(Yang et al., 2203.03466, table 8; Dey et al., CompleteP, 2505.01618, table 1 with alpha = 1.) "As drawn" is the base's: init gpt2
(.02), or fan-in and xavier, whose deviation falls with the width by itself. Here the head keeps its size, so attention's 1 /
sqrt(head) needs no change.

Limits: AdamW's epsilon stays (it should fall with m l where gradients come near it); a tied matrix belongs to both ends at once, so
untie matrices across widths; pre-norm only.
"""

from __future__ import annotations

from collections.abc import Iterable

from glm.model.config import ModelConfig


def width_ratio(config: ModelConfig) -> float:
    """m; 1 without muP."""
    return config.hidden / config.scaling.base_hidden if config.scaling.kind != "standard" else 1.0


def branch_scale(config: ModelConfig) -> float:
    """The factor on a residual branch."""
    if config.scaling.kind != "complete-p":
        return 1.0
    return config.scaling.base_layers / config.layers


def rate_factors(config: ModelConfig, matrices: Iterable[str]) -> dict[str, float]:
    """Factors on the rate of hidden matrices, by name; divide their decay by it. Empty: there are none."""
    ratio = width_ratio(config)
    return {} if ratio == 1.0 else dict.fromkeys(matrices, 1.0 / ratio)

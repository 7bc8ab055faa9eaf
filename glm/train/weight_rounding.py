"""bf16 weights without fp32 masters: rounds updated weights to bf16, and keeps nothing else of them.

    stochastic   w <- SR(w + u): up or down with the probability of the remainder, so that the mean of many small updates is
                 right (Zamirai et al., 2010.06192, section 4; 2502.20566)
    kahan        t = w + u + c,  w <- bf16(t),  c <- bf16(t - w): the next update adds what was rounded off (the same)

Plain rounding loses an update below half a unit in the last place, 2^-9 of a weight; these do not. The draws are a function of
(seed, update, place of the parameter). The moments keep c.

Limits: a run computes the numbers of one without masters, but needs their memory: the masters hold bf16 values in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from glm.model.dropout import row_keys
from stabilitylab.formats import BF16, round_to

MasterRounding = Literal["masters", "stochastic", "kahan"]


@torch.no_grad()
def round_weights(
    weights: Sequence[Tensor],
    compensations: Sequence[Tensor],
    kept: MasterRounding,
    *,
    seed: int,
    update: int,
) -> None:
    """Round fp32 weights to bf16 values, in place.

    Args:
        compensations: c of each weight, updated in place; empty with stochastic rounding.
        kept: "stochastic" or "kahan".
        seed: of the run.
        update: its number.
    """
    if kept == "kahan":
        for weight, compensation in zip(weights, compensations, strict=True):
            total = weight + compensation
            weight.copy_(total.bfloat16())
            compensation.copy_((total - weight).bfloat16())
        return
    keys = row_keys(seed, update, range(len(weights))).tolist()
    for weight, key in zip(weights, keys, strict=True):
        generator = torch.Generator(device=weight.device).manual_seed(key)
        weight.copy_(round_to(weight, BF16, rounding="stochastic", generator=generator))

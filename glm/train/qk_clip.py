"""QK-clip: heads whose scores grow too large get smaller query and key weights (Kimi K2, 2507.20534, section 2.1).

    S  the largest score of a head in an update's micro-batches, f = min(1, t / S):    W_q <- f^(1/2) W_q,   W_k <- f^(1/2) W_k

and biases likewise, so that the same input would give a largest score of t. Only heads that exceed t move, and only by what they
exceed. Where query heads share keys, those are others' too: W_q <- f W_q alone. The moments are left as they are.

It acts on the masters at the end of an update, so that the instrument sees it as part of that. Nothing is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from glm.model.attention import Attention


@torch.no_grad()
def clip_queries_and_keys(
    model: nn.Module, masters: Mapping[str, Tensor], threshold: float
) -> dict[str, Tensor]:
    """Scale what has to be, in place; returns telemetry: the share of heads that were, and the largest score.

    Args:
        model: its attention layers have kept their largest scores; they forget them.
        masters: fp32 weights by name.
        threshold: t.
    """
    shares: list[Tensor] = []
    for path, module in model.named_modules():
        if not isinstance(module, Attention) or module.largest_H is None:
            continue
        largest_H, module.largest_H = module.largest_H.float(), None
        # A head whose largest score is not positive has nothing to clip, and one that is not finite no factor.
        factor_H = (threshold / largest_H.clamp_min(threshold)).nan_to_num(1.0)
        heads, keys, head = module.heads, module.key_heads, module.head
        query_H = factor_H.sqrt() if keys == heads else factor_H
        key_G = factor_H.sqrt() if keys == heads else factor_H.new_ones(keys)
        rows = torch.cat((query_H, key_G)).repeat_interleave(head)
        for kind in ("weight", "bias"):
            master = masters.get(f"{path}.query_key_value.{kind}")
            if master is not None:
                own = master[: len(rows)]
                own.mul_(rows[:, None] if kind == "weight" else rows)
        shares.append(torch.stack(((factor_H < 1).float().mean(), largest_H.amax())))
    if not shares:
        return {}
    both = torch.stack(shares)
    return {"qk_clip/-/clipped_heads": both[:, 0].mean(), "qk_clip/-/score_max": both[:, 1].amax()}

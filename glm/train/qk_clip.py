"""QK-clip shrinks the query and key weights of heads whose scores grow too large (Kimi K2, 2507.20534, section 2.1).

    S  the largest score of a head in an update's micro-batches, f = min(1, t / S):    W_q <- f^(1/2) W_q,   W_k <- f^(1/2) W_k

and biases likewise, so that the same input would give a largest score of t. Only heads that exceed t move, and only by the excess.
Query heads that share keys share W_k too, so there W_q <- f W_q alone. The moments stay as they are.

It acts on the masters at the end of an update, so that the instrument sees it as part of the update; after a skipped update it
forgets the scores. It never waits for the device. Replicas take the largest score of all of them, so that they clip alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from glm.model.attention import Attention


def forget_scores(model: nn.Module) -> None:
    """Forget the scores of a skipped update."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.largest_H = None


@torch.no_grad()
def clip_queries_and_keys(
    model: nn.Module,
    masters: Mapping[str, Tensor],
    threshold: float,
    *,
    across: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Scale in place where needed; returns telemetry: the share of heads scaled, and the largest score.

    Args:
        model: its attention layers hold their largest scores; the call clears them.
        masters: fp32 weights by name.
        threshold: t.
        across: gives the largest over all replicas, [layers, heads]; None: there are no others.
    """
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, Attention) and m.keeps_largest]
    if not layers or (across is None and all(layer.largest_H is None for _, layer in layers)):
        return {}
    # A replica without rows, or an unused layer, has no scores.
    like = layers[0][1].query_key_value.weight
    kept = [like.new_full((m.heads,), -torch.inf) if m.largest_H is None else m.largest_H for _, m in layers]
    largest_LH = torch.stack(kept).float()
    if across is not None:
        largest_LH = across(largest_LH)
    forget_scores(model)
    # A head whose largest score is not positive needs no clip; one that is not finite has no factor.
    factor_LH = threshold / largest_LH.clamp_min(threshold)
    factor_LH = torch.where(largest_LH.isfinite(), factor_LH, 1.0)
    for (path, module), factor_H in zip(layers, factor_LH, strict=True):
        heads, keys, head = module.heads, module.key_heads, module.head
        query_H = factor_H.sqrt() if keys == heads else factor_H
        key_G = factor_H.sqrt() if keys == heads else factor_H.new_ones(keys)
        rows = torch.cat((query_H, key_G)).repeat_interleave(head)
        for kind in ("weight", "bias"):
            master = masters.get(f"{path}.query_key_value.{kind}")
            if master is not None:
                own = master[: len(rows)]
                own.mul_(rows[:, None] if kind == "weight" else rows)
    clipped, largest = (factor_LH < 1).float().mean(), largest_LH.amax()
    return {"qk_clip/-/clipped_heads": clipped, "qk_clip/-/score_max": largest}

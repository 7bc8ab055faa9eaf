"""Dropout whose masks are a function of (seed, update, row, place), not of earlier draws.

    y = x m / (1 - p),   m[b] ~ Bernoulli(1 - p) of a generator seeded with mix(key[b], place),   key[b] = mix(seed, update, row b)

Each row draws its own mask, so the mask is the same however micro-batches and replicas split the update's rows. A place is a site
of the whole model (0 the embedding, then two per layer), so the mask is the same in whichever pipeline stage a layer lies; and
tensor ranks that hold the same activations drop the same ones without communicating. Recomputed activations get the keys that they
had. A resumed run draws what the first would have drawn.

``mix`` is SplitMix64's finaliser (Steele, Lea and Flood 2014). torch's own generator draws the numbers, as in ``F.dropout``.

Shapes: B rows, and whatever a row has.

Limits: masks differ between kinds of device. CPU generators take 32 bits of a seed, so expect two of 65,000 masks to be alike, in
other places of other updates. Attention probabilities have no dropout, as in GLM-130B: fused attention needs no masks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

EMBEDDING = 0
_BITS = 2**64 - 1


def _mix(state: int, number: int) -> int:
    z = (state + (number + 1) * 0x9E3779B97F4A7C15) & _BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _BITS
    return z ^ (z >> 31)


def row_keys(seed: int, update: int, rows: Iterable[int]) -> Tensor:
    """Keys of the masks of some rows of an update, [B] int64 on the CPU.

    Args:
        seed: of the run.
        update: its number.
        rows: their numbers within the update.
    """
    state = _mix(_mix(0, seed), update)
    return torch.tensor([_mix(state, row) >> 1 for row in rows], dtype=torch.int64)


def fresh_keys(rows: int) -> Tensor:
    """Keys drawn from torch's default generator, for callers without keys."""
    return torch.randint(2**63 - 1, (rows,), dtype=torch.int64)


def attention_place(layer: int) -> int:
    """Place of a layer's attention output."""
    return 1 + 2 * layer


def feed_forward_place(layer: int) -> int:
    """Place of a layer's feed-forward output."""
    return 2 + 2 * layer


# An operator of its own, which torch.compile calls as it is: the masks stay the same, and no graph breaks or is built again.
@torch.library.custom_op("glm::dropout_mask", mutates_args=())
def dropout_mask(x: Tensor, keys_B: Tensor, place: int, p: float) -> Tensor:
    """0 where x is dropped, 1 / (1 - p) elsewhere, in x's format."""
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    generator = torch.Generator(device=x.device)
    for row, key in zip(mask.unbind(0), keys_B.tolist(), strict=True):
        generator.manual_seed(_mix(key, place))
        row.bernoulli_(1 - p, generator=generator)
    return mask.div_(1 - p)


@dropout_mask.register_fake
def _(x: Tensor, keys_B: Tensor, place: int, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def dropout(x: Tensor, p: float, keys_B: Tensor | None, place: int) -> Tensor:
    """Drop elements of x.

    Args:
        x: [B, ...].
        p: share to drop.
        keys_B: of the rows; None: no dropout.
        place: site of the whole model.
    """
    if p == 0 or keys_B is None:
        return x
    mask: Tensor = dropout_mask(x.detach(), keys_B, place, p)
    return x * mask

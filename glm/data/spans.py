"""Chooses the masked tokens of a piece: span lengths, places and order, so that everything always fits.

[MASK] (short blanks; GLM, 2103.10360, section 2.1; shares and special cases as GLM-130B, 2210.02414, section 2.2). A piece has room
for P tokens; k spans with S tokens in all, out of a text of n, take n + 2k of them (``blanks``). ``draw_spans`` draws lengths
first, from Poisson(3) without its zero, until S >= 15 % of n; n is then the largest text for which that many spans fit, n + 2k <=
P, and fewer spans would not reach the share. So no draw needs a cut. (Fixed n = 500 in rows of 512, as published code has it, loses
about a third of the targets.) Two pieces in a hundred have a single span.

Places are uniform over all that leave a token between each two spans; the order of generation is a random permutation.

Shapes: Q pieces, K the largest number of spans.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from glm.data.config import ObjectiveConfig
from glm.data.random import uniform

Ints = NDArray[np.int64]

LEAST_ROOM = 3  # [MASK], sop, and the one masked token

# The distribution function at 1, 2, ... for the commonest mean, as SciPy, which takes long to import, computes it.
_OF_THREE = (
    (0.15718708947377208, 0.3929677236844302, 0.6287483578950883, 0.8055838335530819, 0.9116851189478782, 0.9647357616452762)
    + (0.9874717513727325, 0.9959977475205286, 0.9988397462364607, 0.9996923458512402, 0.9999248730189074, 0.9999830048108242)
    + (0.9999964198397281, 0.9999992944887789, 0.9999998694185891, 0.9999999772179285, 0.9999999962413414, 0.9999999994119102)
    + (0.9999999999125263, 0.9999999999876187, 0.9999999999983462, 0.999999999999809, 1.0)
)  # fmt: skip

# Which stream of draws is for what; each has room for 2^20 draws a sample.
_LENGTHS, _PLACES, _ORDER, _SINGLE = (np.int64(n) << 20 for n in (1, 2, 3, 5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Masked spans of Q pieces.

    Attributes:
        text_Q: source tokens of each piece.
        count_Q: its spans.
        length_QK: their lengths; 0 beyond the piece's count.
        start_QK: their places in the source.
        order_QK: order of generation: rank j -> span.
    """

    text_Q: Ints
    count_Q: Ints
    length_QK: Ints
    start_QK: Ints
    order_QK: Ints


def most_spans(room: int, mask_fraction: float) -> int:
    """Spans a piece of ``room`` tokens can have: each is at least one token, and the last one starts below the fraction."""
    return int(room * mask_fraction) + 2


def draw_spans(seed: int, sample_Q: Ints, room: int, config: ObjectiveConfig) -> Spans:
    """Draw text length, span lengths, places and order for each piece; a pure function of (seed, sample).

    ``room`` is at least ``LEAST_ROOM``.
    """
    K = most_spans(room, config.mask_fraction)
    k_K = np.arange(K)
    sample_Q1 = sample_Q[:, None]
    length_QK = _span_lengths(uniform(seed, sample_Q1, _LENGTHS + k_K), config.span_mean)
    # One span that fills the piece always fits, so there is always a choice below.
    np.minimum(length_QK, room - 2, out=length_QK)
    masked_QK = length_QK.cumsum(1)
    # With k spans the text can be at most S_k / fraction (or fewer spans would have been too few), and must leave room.
    longest_QK = np.minimum((masked_QK / config.mask_fraction).astype(np.int64), room - 2 * (k_K + 1))
    # Spans need a free token between each two of them.
    fits_QK = longest_QK >= masked_QK + k_K
    # Fewer spans suffice for so short a text: that choice belongs to a smaller k.
    fits_QK &= longest_QK * config.mask_fraction > masked_QK - length_QK
    longest_QK[~fits_QK] = 0
    chosen_Q = longest_QK.argmax(1)
    text_Q = longest_QK[np.arange(len(sample_Q)), chosen_Q]
    if config.single_span:
        single_Q = uniform(seed, sample_Q, _SINGLE) < config.single_span
        chosen_Q[single_Q], text_Q[single_Q] = 0, room - 2
    count_Q = chosen_Q + 1
    # Pieces seldom need all of the K columns that they could.
    K = int(count_Q.max())
    k_K, length_QK = k_K[:K], length_QK[:, :K]
    unused_QK = k_K >= count_Q[:, None]
    length_QK[unused_QK] = 0
    # Uniform over all placements with a gap between spans: choose k of the n - S + 1 slots around the visible tokens.
    end_QK = length_QK.cumsum(1)
    slots_Q = text_Q - end_QK[:, -1] + 1
    start_QK = _choose_slots(uniform(seed, sample_Q1, _PLACES + k_K), slots_Q, count_Q)
    start_QK += end_QK - length_QK
    start_QK[unused_QK] = 0
    order_QK = uniform(seed, sample_Q1, _ORDER + k_K)
    order_QK[unused_QK] = 2.0
    return Spans(
        text_Q=text_Q,
        count_Q=count_Q,
        length_QK=length_QK,
        start_QK=start_QK,
        order_QK=order_QK.argsort(1),
    )


def _span_lengths(u: NDArray[np.float64], mean: float) -> Ints:
    """Quantiles of the Poisson distribution without its zero.

    A guide table of 4096 cells answers where a cell lies within one value, nearly always; a search answers the rest.
    """
    cumulative, guide = _quantiles(mean)
    cell = (u * (len(guide) - 1)).astype(np.int64)
    low = guide[cell]
    between = low != guide[cell + 1]
    low[between] = np.searchsorted(cumulative, u[between], side="right")
    return low + 1


@lru_cache(maxsize=8)
def _quantiles(mean: float) -> tuple[NDArray[np.float64], Ints]:
    cumulative = np.array(_OF_THREE) if mean == 3.0 else _distribution(mean)
    edges = np.arange(4097) / 4096
    return cumulative, np.minimum(np.searchsorted(cumulative, edges, side="right"), len(cumulative) - 1)


def _distribution(mean: float) -> NDArray[np.float64]:
    # scipy.stats computes just this, and takes two seconds to import.
    from scipy import special

    last = int(np.ceil(special.pdtrik(1 - 1e-12, mean)))
    last -= int(special.pdtr(max(last - 1, 0), mean) >= 1 - 1e-12)
    values = np.arange(1, last + 2)
    weight = np.exp(special.xlogy(values, mean) - special.gammaln(values + 1) - mean)
    cumulative: NDArray[np.float64] = (weight / weight.sum()).cumsum()
    cumulative[-1] = 1.0
    return cumulative


def _choose_slots(u_QK: NDArray[np.float64], slots_Q: Ints, count_Q: Ints) -> Ints:
    """Sorted distinct slots, uniform over all subsets; entries beyond a piece's count are meaningless.

    Floyd's algorithm (Bentley and Floyd 1987) takes, for k = 0, 1, ..., a number of 0..largest + k, or largest + k itself where the
    number is taken already. Columns first, so that each step is one pass over contiguous memory.
    """
    K = u_QK.shape[1]
    k_K1 = np.arange(K)[:, None]
    largest_KQ = slots_Q - count_Q + k_K1
    chosen_KQ = (u_QK.T * (largest_KQ + 1)).astype(np.int64)
    for k in range(1, K):
        taken_Q = (chosen_KQ[:k] == chosen_KQ[k]).any(0)
        np.copyto(chosen_KQ[k], largest_KQ[k], where=taken_Q)
    chosen_KQ[k_K1 >= count_Q] = np.iinfo(np.int64).max >> 1
    return np.ascontiguousarray(np.sort(chosen_KQ, axis=0).T)

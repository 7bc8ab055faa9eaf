"""Blank infilling: many pieces of text become many samples at once, and no target is ever cut.

[MASK] (short blanks; GLM, 2103.10360, section 2.1). A piece has room for P tokens. Spans of k lengths s_1..s_k are masked out
of n source tokens, each becomes one [MASK]; behind the corrupted text every span follows, in shuffled order:

    input   a [MASK] b [MASK] c   sop s..   sop s..        n - S + k   and   S + k   tokens, S = sum s_i
    target  .        .        .   s..  eop  s..  eop

so a sample takes n + 2k tokens. Lengths are drawn first, Poisson(3) without zeros, until S >= 15 % of n; n is then the largest
text for which that many spans fit (n + 2k <= P). Hence nothing need be cut, whatever is drawn. (Fixed n = 500 in rows of 512,
as published code has it, loses about a third of the targets.)

[gMASK] (one long blank): g uniform in [0.2 n, n], n = T - 1:   input  prefix [gMASK] sop t_1 .. t_g-1,   target  t_1 .. t_g.

Positions, 1-D as in GLM-130B: context tokens count up, a span's tokens all carry the position of their [MASK]; in [gMASK] rows
they count on. 2-D adds the place inside the span, 0 in the context. Spans keep at least one token between them.

Shapes: Q pieces, K the largest number of spans, P tokens of room a piece. Everything is done for all pieces together: a piece
is a sequence of *runs* (stretches of source, or single special tokens), and runs are expanded with ``numpy.repeat``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from glm.data.batch import NO_TARGET, PADDING_SEGMENT
from glm.data.config import ObjectiveConfig
from glm.data.random import uniform
from glm.data.special import SpecialTokens
from glm.errors import InputError

Ints = NDArray[np.int64]

# Which stream of draws is for what; each has room for 2^20 draws a sample.
_LENGTHS, _PLACES, _ORDER, _GENERATED = (np.int64(n) << 20 for n in range(1, 5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Samples as arrays, [R rows, T]: what ``Batch`` holds, still in numpy. ``intra`` is the 2-D form's second position."""

    tokens: Ints
    targets: Ints
    positions: Ints
    intra: Ints
    context: NDArray[np.bool_]
    segments: NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Masked spans of Q pieces.

    Attributes:
        text_Q: source tokens of each piece.
        count_Q: its spans.
        length_QK: their lengths; 0 beyond the piece's count.
        start_QK: their places in the source.
        order_QK: order in which they are generated: rank j -> span.
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
    """Draw text length, span lengths, places and order for each piece; a pure function of (seed, sample)."""
    K = most_spans(room, config.mask_fraction)
    k_K = np.arange(K)
    length_QK = _poisson(uniform(seed, sample_Q[:, None], _LENGTHS + k_K), config.span_mean)
    masked_QK = length_QK.cumsum(1)
    # With k spans the text can be at most S_k / fraction (or fewer spans would have been too few), and must leave room.
    longest_QK = np.minimum((masked_QK / config.mask_fraction).astype(np.int64), room - 2 * (k_K + 1))
    # Spans need a free token between each two of them.
    fits_QK = longest_QK >= masked_QK + k_K
    # Fewer spans would do for a text this short: that choice belongs to a smaller k.
    fits_QK &= longest_QK * config.mask_fraction > masked_QK - length_QK
    if not fits_QK.any(1).all():
        raise InputError(
            f"pieces of {room} tokens are too short for spans of {config.span_mean:g} at {config.mask_fraction:.0%}: "
            "use a longer model.length or fewer objective.pieces"
        )
    longest_QK = np.where(fits_QK, longest_QK, 0)
    chosen_Q = longest_QK.argmax(1)
    q = np.arange(len(sample_Q))
    text_Q, count_Q = longest_QK[q, chosen_Q], chosen_Q + 1
    used_QK = k_K < count_Q[:, None]
    length_QK = np.where(used_QK, length_QK, 0)
    # Uniform over all placements with a gap between spans: choose k of the n - S + 1 slots around the visible tokens.
    slots_Q = text_Q - length_QK.sum(1) + 1
    slot_QK = _choose_slots(uniform(seed, sample_Q[:, None], _PLACES + k_K), slots_Q, used_QK)
    start_QK = slot_QK + length_QK.cumsum(1) - length_QK
    order_QK = np.where(used_QK, uniform(seed, sample_Q[:, None], _ORDER + k_K), 2.0).argsort(1)
    return Spans(text_Q=text_Q, count_Q=count_Q, length_QK=length_QK, start_QK=start_QK, order_QK=order_QK)


def _poisson(u: NDArray[np.float64], mean: float) -> Ints:
    """Quantiles of the Poisson distribution without its zero, by table."""
    values = np.arange(1, int(stats.poisson.ppf(1 - 1e-12, mean)) + 2)
    weight = stats.poisson.pmf(values, mean)
    cumulative = (weight / weight.sum()).cumsum()
    return values[np.minimum(np.searchsorted(cumulative, u, side="right"), len(values) - 1)]


def _choose_slots(u_QK: NDArray[np.float64], slots_Q: Ints, used_QK: NDArray[np.bool_]) -> Ints:
    """Sorted distinct slots, uniform over all subsets (Floyd's algorithm, Bentley and Floyd 1987), column by column."""
    count_Q = used_QK.sum(1)
    never = np.iinfo(np.int64).max
    chosen_QK = np.full(u_QK.shape, never)
    for k in range(int(count_Q.max(initial=0))):
        largest_Q = slots_Q - count_Q + k
        drawn_Q = (u_QK[:, k] * (largest_Q + 1)).astype(np.int64)
        taken_Q = (chosen_QK[:, :k] == drawn_Q[:, None]).any(1)
        chosen_QK[:, k] = np.where(used_QK[:, k], np.where(taken_Q, largest_Q, drawn_Q), never)
    chosen_QK.sort(1)
    return np.where(used_QK, chosen_QK, 0)


def mask_pieces(
    stream: NDArray[np.unsignedinteger], first_Q: Ints, spans: Spans, room: int, special: SpecialTokens
) -> Rows:
    """Lay out [MASK] pieces, each padded to ``room`` tokens: rows of the result are pieces.

    Args:
        stream: the token stream.
        first_Q: where each piece's text begins in it.
    """
    Q, K = spans.length_QK.shape
    used_QK = spans.length_QK > 0
    q_Q1 = np.arange(Q)[:, None]
    # Runs of the context: text, mask, text, mask, ..., text. Of the rest: sop, span, sop, span, ...; then padding.
    end_QK = spans.start_QK + spans.length_QK
    before_QK = np.where(
        used_QK, spans.start_QK - np.concatenate([np.zeros((Q, 1), np.int64), end_QK[:, :-1]], 1), 0
    )
    tail_Q = spans.text_Q - end_QK[np.arange(Q), spans.count_Q - 1]
    ordered_length_QK = spans.length_QK[q_Q1, spans.order_QK]
    ordered_start_QK = spans.start_QK[q_Q1, spans.order_QK]
    used_first_QK = ordered_length_QK > 0

    columns = 4 * K + 2
    length = np.zeros((Q, columns), np.int64)
    source = np.zeros((Q, columns), np.int64)  # offset of the run's first token in the piece's text
    length[:, 0 : 2 * K : 2] = before_QK
    source[:, 0 : 2 * K : 2] = spans.start_QK - before_QK
    length[:, 1 : 2 * K : 2] = used_QK
    length[:, 2 * K] = tail_Q
    source[:, 2 * K] = spans.text_Q - tail_Q
    context_Q = length[:, : 2 * K + 1].sum(1)
    length[:, 2 * K + 1 : 4 * K + 1 : 2] = used_first_QK
    source[:, 2 * K + 1 : 4 * K + 1 : 2] = (
        ordered_start_QK - 1
    )  # so that a sop's target, one on, is the span's first
    length[:, 2 * K + 2 : 4 * K + 1 : 2] = ordered_length_QK
    source[:, 2 * K + 2 : 4 * K + 1 : 2] = ordered_start_QK
    length[:, -1] = room - length.sum(1)

    # Expand the runs: for every token its run, and its place in it.
    flat = length.ravel()
    run = np.repeat(np.arange(flat.size), flat)
    within = np.arange(Q * room) - np.repeat(flat.cumsum() - flat, flat)
    column = run % columns
    piece = run // columns
    at = first_Q[piece] + source.ravel()[run] + within

    generated = (column > 2 * K) & (column < columns - 1)
    is_mask = (column < 2 * K) & (column % 2 == 1)
    is_sop = generated & (column % 2 == 1)
    is_padding = column == columns - 1
    text = at.clip(0, len(stream) - 1)
    tokens = stream[text].astype(np.int64)
    tokens[is_mask] = special.mask
    tokens[is_sop] = special.sop
    tokens[is_padding] = special.pad

    last = generated & ~is_sop & (within == flat[run] - 1)
    targets = np.full(Q * room, NO_TARGET, np.int64)
    targets[generated] = stream[(text[generated] + 1).clip(0, len(stream) - 1)]
    targets[last] = special.eop

    # A context token's position is its place; a span's tokens all have the place of their mask.
    place = np.arange(Q * room) % room
    mask_place_QK = length[:, : 2 * K].cumsum(1)[:, 1::2] - 1
    ordered_place_QK = mask_place_QK[q_Q1, spans.order_QK]
    rank = (column - (2 * K + 1)) // 2
    positions = place.copy()
    positions[generated] = ordered_place_QK[piece[generated], rank[generated]]
    positions[is_padding] = 0
    intra = np.where(generated, within + 1 + (~is_sop), 0)

    return Rows(
        tokens=tokens.reshape(Q, room),
        targets=targets.reshape(Q, room),
        positions=positions.reshape(Q, room),
        intra=intra.reshape(Q, room),
        context=(place < context_Q[piece]).reshape(Q, room),
        segments=np.where(is_padding, PADDING_SEGMENT, 0).astype(np.int32).reshape(Q, room),
    )


def gmask_rows(
    seed: int,
    stream: NDArray[np.unsignedinteger],
    sample_R: Ints,
    first_R: Ints,
    length: int,
    config: ObjectiveConfig,
    special: SpecialTokens,
) -> Rows:
    """[gMASK] rows of ``length`` tokens, from ``length - 1`` source tokens each."""
    n = length - 1
    least = max(1, int(np.ceil(config.gmask_least * n)))
    generated_R = least + (uniform(seed, sample_R, _GENERATED) * (n - least + 1)).astype(np.int64)
    prefix_R1 = (n - generated_R)[:, None]
    place_T = np.arange(length)
    # prefix | gMASK | sop | text from the prefix's end: behind the two special tokens the source lags by two.
    source_RT = np.where(place_T < prefix_R1, place_T, place_T - 2).clip(0)
    tokens = stream[first_R[:, None] + source_RT].astype(np.int64)
    tokens[place_T == prefix_R1] = special.gmask
    tokens[place_T == prefix_R1 + 1] = special.sop
    generated_RT = place_T > prefix_R1
    targets = np.where(
        generated_RT, stream[first_R[:, None] + (place_T - 1).clip(0)].astype(np.int64), NO_TARGET
    )
    return Rows(
        tokens=tokens,
        targets=targets,
        positions=np.broadcast_to(place_T, tokens.shape).copy(),
        intra=np.where(generated_RT, place_T - prefix_R1, 0),
        context=~generated_RT,
        segments=np.zeros(tokens.shape, np.int32),
    )


def causal_rows(stream: NDArray[np.unsignedinteger], first_R: Ints, length: int) -> Rows:
    """Next-token rows, from ``length + 1`` source tokens each."""
    place_T = np.arange(length)
    text = stream[first_R[:, None] + np.arange(length + 1)].astype(np.int64)
    return Rows(
        tokens=text[:, :-1],
        targets=text[:, 1:],
        positions=np.broadcast_to(place_T, (len(first_R), length)).copy(),
        intra=np.zeros((len(first_R), length), np.int64),
        context=np.zeros((len(first_R), length), bool),
        segments=np.zeros((len(first_R), length), np.int32),
    )

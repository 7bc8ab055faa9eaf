"""Blank infilling: turns many pieces of text into samples at once, and never cuts a target.

[MASK] (short blanks; GLM, 2103.10360, section 2.1). Each of the spans s_1..s_k of n source tokens (``spans``) becomes one [MASK];
the spans follow the corrupted text in shuffled order:

    input   a [MASK] b [MASK] c   sop s..   sop s..        n - S + k   and   S + k   tokens, S = sum s_i
    target  .        .        .   s..  eop  s..  eop

so a sample takes n + 2k tokens, and ``spans`` chooses n and k so that they fit.

[gMASK] (one long blank): g uniform in [0.2 n, n], n = T - 1:   input  prefix [gMASK] sop t_1 .. t_g-1,   target  t_1 .. t_g.

Positions, 1-D as in GLM-130B: context tokens count up, a span's tokens all carry the position of their [MASK]; in [gMASK] rows they
count on. 2-D adds the place inside the span, 0 in the context.

Shapes: Q pieces, K the largest number of spans, P tokens of room a piece. The code handles all pieces together: a piece is a
sequence of *runs* (stretches of source, or single special tokens), and ``numpy.repeat`` expands the runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glm.data.batch import NO_TARGET, PADDING_SEGMENT
from glm.data.config import ObjectiveConfig
from glm.data.random import uniform
from glm.data.spans import Ints, Spans
from glm.data.special import SpecialTokens

_GENERATED = np.int64(4) << 20  # the stream of draws of [gMASK] lengths; those of spans are in ``spans``


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleArrays:
    """Samples as arrays, [R rows, T]: what ``Batch`` holds, still in numpy. ``intra`` is the 2-D form's second position."""

    tokens: Ints
    targets: Ints
    positions: Ints
    intra: Ints
    context: NDArray[np.bool_]
    segments: NDArray[np.int32]


def mask_pieces(
    stream: NDArray[np.unsignedinteger], first_Q: Ints, spans: Spans, room: int, special: SpecialTokens
) -> SampleArrays:
    """Lay out [MASK] pieces, each padded to ``room`` tokens: rows of the result are pieces.

    Args:
        stream: the token stream.
        first_Q: where each piece's text begins in it.
    """
    Q, K = spans.length_QK.shape
    used_QK = spans.length_QK > 0
    end_QK = spans.start_QK + spans.length_QK
    q_Q1 = np.arange(Q)[:, None]

    # A piece's runs: text, [MASK], text, [MASK], ..., text; then each span after its sop; then padding.
    columns = 3 * K + 2
    spans_from = 2 * K + 1
    length = np.zeros((Q, columns), np.int64)
    source = np.zeros((Q, columns), np.int64)  # where the run's first token lies in the piece's text
    masks, texts = np.s_[:, 1 : 2 * K : 2], np.s_[:, 0 : 2 * K : 2]
    generated = np.s_[:, spans_from : spans_from + K]
    length[masks] = used_QK
    source[:, 2 : 2 * K : 2] = end_QK[:, :-1]
    length[texts] = np.where(used_QK, spans.start_QK - source[texts], 0)
    source[:, 2 * K] = end_QK[q_Q1[:, 0], spans.count_Q - 1]
    length[:, 2 * K] = spans.text_Q - source[:, 2 * K]
    # The run begins one before the span: its first token is the sop, its second the span's first.
    source[generated] = spans.start_QK[q_Q1, spans.order_QK] - 1
    length[generated] = spans.length_QK[q_Q1, spans.order_QK] + used_QK
    begin = length.cumsum(1) - length  # place in the row
    used_Q = begin[:, -1]
    context_Q = begin[:, spans_from]
    length[:, -1] = room - used_Q

    # Expand the runs: token p of a run is source token p - begin + source.
    at = np.repeat((first_Q[:, None] + source - begin).ravel(), length.ravel()).reshape(Q, room)
    place_P = np.arange(room)
    at += place_P
    tokens = stream.take(at, mode="clip").astype(np.int64)
    flat = tokens.reshape(-1)
    row_QK = np.broadcast_to(q_Q1 * room, (Q, K))
    mask_place_QK = begin[masks]
    flat[(row_QK + mask_place_QK)[used_QK]] = special.mask
    sop = (row_QK + begin[generated])[used_QK]
    flat[sop] = special.sop
    padding = place_P >= used_Q[:, None]
    tokens[padding] = special.pad

    context = place_P < context_Q[:, None]
    generated_at = np.flatnonzero(~(context | padding))
    run_length = length[generated][used_QK]
    targets = np.full(Q * room, NO_TARGET, np.int64)
    targets[generated_at] = stream.take(at.reshape(-1)[generated_at] + 1, mode="clip")
    targets[sop + run_length - 1] = special.eop

    # A context token's position is its place; a span's tokens all have the place of their mask.
    positions = np.where(padding, 0, place_P).reshape(-1)
    positions[generated_at] = np.repeat(mask_place_QK[q_Q1, spans.order_QK][used_QK], run_length)
    intra = np.zeros(Q * room, np.int64)
    intra[generated_at] = generated_at - np.repeat(sop, run_length) + 1

    return SampleArrays(
        tokens=tokens,
        targets=targets.reshape(Q, room),
        positions=positions.reshape(Q, room),
        intra=intra.reshape(Q, room),
        context=context,
        segments=np.where(padding, np.int32(PADDING_SEGMENT), np.int32(0)),
    )


def gmask_rows(
    seed: int,
    stream: NDArray[np.unsignedinteger],
    sample_R: Ints,
    first_R: Ints,
    length: int,
    config: ObjectiveConfig,
    special: SpecialTokens,
) -> SampleArrays:
    """[gMASK] rows of ``length`` tokens, from ``length - 1`` source tokens each."""
    n = length - 1
    least = max(1, int(np.ceil(config.gmask_least * n)))
    generated_R = least + (uniform(seed, sample_R, _GENERATED) * (n - least + 1)).astype(np.int64)
    prefix_R1 = (n - generated_R)[:, None]
    place_T = np.arange(length)
    # prefix | gMASK | sop | text from the prefix's end: after the two special tokens the source lags by two.
    source_RT = np.where(place_T < prefix_R1, place_T, place_T - 2).clip(0)
    tokens = stream[first_R[:, None] + source_RT].astype(np.int64)
    tokens[place_T == prefix_R1] = special.gmask
    tokens[place_T == prefix_R1 + 1] = special.sop
    generated_RT = place_T > prefix_R1
    targets = np.where(
        generated_RT, stream[first_R[:, None] + (place_T - 1).clip(0)].astype(np.int64), NO_TARGET
    )
    return SampleArrays(
        tokens=tokens,
        targets=targets,
        positions=np.broadcast_to(place_T, tokens.shape).copy(),
        intra=np.where(generated_RT, place_T - prefix_R1, 0),
        context=~generated_RT,
        segments=np.zeros(tokens.shape, np.int32),
    )


def causal_rows(stream: NDArray[np.unsignedinteger], first_R: Ints, length: int) -> SampleArrays:
    """Next-token rows, from ``length + 1`` source tokens each."""
    place_T = np.arange(length)
    text = stream[first_R[:, None] + np.arange(length + 1)].astype(np.int64)
    return SampleArrays(
        tokens=text[:, :-1],
        targets=text[:, 1:],
        positions=np.broadcast_to(place_T, (len(first_R), length)).copy(),
        intra=np.zeros((len(first_R), length), np.int64),
        context=np.zeros((len(first_R), length), bool),
        segments=np.zeros((len(first_R), length), np.int32),
    )

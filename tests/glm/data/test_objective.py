"""Blank infilling against its definition: nothing cut, spans as drawn, positions, visibility, distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from glm.data.batch import NO_TARGET
from glm.data.blanks import gmask_rows, mask_pieces
from glm.data.config import ObjectiveConfig
from glm.data.loader import Loader
from glm.data.spans import _quantiles, draw_spans
from glm.data.special import SpecialTokens
from glm.errors import InputError

CONFIG = ObjectiveConfig(single_span=0.0)
SPECIAL = SpecialTokens()
STREAM = np.arange(100, 40_100).astype(np.uint16)
ROOM = 256


def pieces(count: int, room: int = ROOM, seed: int = 3, config: ObjectiveConfig = CONFIG):
    sample = np.arange(count)
    first = sample * 131
    spans = draw_spans(seed, sample, room, config)
    return first, spans, mask_pieces(STREAM, first, spans, room, SPECIAL)


def naive_piece(text, lengths, starts, order, room):
    """The same piece built token by token, as in the definition."""
    spans = list(zip(starts, lengths, strict=True))
    tokens, positions, place_of_mask, at = [], [], [], 0
    for start, length in spans:
        tokens += text[at:start]
        place_of_mask.append(len(tokens))
        tokens.append(SPECIAL.mask)
        at = start + length
    tokens += text[at:]
    positions = list(range(len(tokens)))
    context = [True] * len(tokens)
    targets = [NO_TARGET] * len(tokens)
    intra = [0] * len(tokens)
    for j in order:
        start, length = spans[j]
        span = text[start : start + length]
        tokens += [SPECIAL.sop, *span]
        targets += [*span, SPECIAL.eop]
        positions += [place_of_mask[j]] * (length + 1)
        intra += range(1, length + 2)
        context += [False] * (length + 1)
    padding = room - len(tokens)
    assert padding >= 0, "a piece does not fit its room"
    return (
        tokens + [SPECIAL.pad] * padding,
        targets + [NO_TARGET] * padding,
        positions + [0] * padding,
        intra + [0] * padding,
        context + [False] * padding,
    )


@pytest.mark.parametrize("room", [32, 64, 256, 512])
def test_pieces_are_the_naive_ones_and_no_target_is_cut(room):
    first, spans, rows = pieces(200, room, config=ObjectiveConfig(single_span=0.1))
    for q in range(200):
        k, n = int(spans.count_Q[q]), int(spans.text_Q[q])
        text = STREAM[first[q] : first[q] + n].tolist()
        lengths, starts = spans.length_QK[q, :k].tolist(), spans.start_QK[q, :k].tolist()
        expected = naive_piece(text, lengths, starts, spans.order_QK[q, :k].tolist(), room)
        for ours, theirs in zip(
            (rows.tokens, rows.targets, rows.positions, rows.intra, rows.context), expected, strict=True
        ):
            assert ours[q].tolist() == theirs
        # Every masked token is a target, and each span's end is.
        assert (rows.targets[q] != NO_TARGET).sum() == sum(lengths) + k


def test_spans_are_apart_shuffled_and_reach_the_fraction():
    _, spans, _ = pieces(2000)
    used = spans.length_QK > 0
    gap = spans.start_QK[:, 1:] - (spans.start_QK + spans.length_QK)[:, :-1]
    assert (gap[used[:, 1:]] >= 1).all()
    masked, text = spans.length_QK.sum(1), spans.text_Q
    last = spans.length_QK[np.arange(2000), spans.count_Q - 1]
    assert (masked >= 0.15 * text - 1e-9).all()
    assert (masked - last < 0.15 * text).all()
    # 25-odd spans in order by chance: 1/25! each. Of 2,000 pieces not one is.
    in_order = (np.diff(np.where(used, spans.order_QK, 10_000)) > 0).all(1)
    assert not in_order.any()
    assert (text + 2 * spans.count_Q <= ROOM).all()
    # Room is used: what is left is less than one more token and span could take.
    assert (ROOM - text - 2 * spans.count_Q).mean() < 8


def test_span_lengths_are_poisson_without_zero():
    _, spans, _ = pieces(4000)
    # The last span of a piece is the one that crossed the fraction, so longer than typical: leave it out of both sides.
    inner = np.concatenate([row[: k - 1] for row, k in zip(spans.length_QK, spans.count_Q, strict=True)])
    values = np.arange(1, 9)
    expected = stats.poisson.pmf(values, 3) / (1 - math.exp(-3))
    seen = np.array([(inner == v).mean() for v in values])
    # Five binomial deviations, plus 2 % for the stopping rule's own bias against long spans.
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected / len(inner)) + 0.02 * expected + 0.003).all()


def test_some_pieces_have_one_span_only():
    _, spans, _ = pieces(5000, config=ObjectiveConfig())
    assert abs((spans.count_Q == 1).mean() - 0.02) < 5 * math.sqrt(0.02 * 0.98 / 5000)
    assert (spans.text_Q[spans.count_Q == 1] == ROOM - 2).all()


def test_places_of_spans_are_uniform():
    # Four tokens and one span of one: it may begin at 0, 1, 2 or 3, each a quarter of the time.
    config = ObjectiveConfig(single_span=1.0, span_mean=1e-9)
    starts = draw_spans(1, np.arange(8000), 6, config).start_QK[:, 0]
    counts = np.bincount(starts, minlength=4)
    assert len(counts) == 4
    assert stats.chisquare(counts).pvalue > 1e-6


def test_gmask_rows_are_the_definition():
    sample = np.arange(500)
    first = sample * 61
    rows = gmask_rows(1, STREAM, sample, first, 128, CONFIG, SPECIAL)
    generated = (rows.targets != NO_TARGET).sum(1)
    for r in range(500):
        text, g = STREAM[first[r] : first[r] + 127].tolist(), int(generated[r])
        prefix = text[: 127 - g]
        assert rows.tokens[r].tolist() == [*prefix, SPECIAL.gmask, SPECIAL.sop, *text[127 - g : -1]]
        assert rows.targets[r].tolist() == [NO_TARGET] * (128 - g) + text[127 - g :]
        assert rows.context[r].tolist() == [True] * (128 - g) + [False] * g
        assert rows.positions[r].tolist() == list(range(128))
    # Uniform over [0.2 n, n]: Kolmogorov-Smirnov against it, with the lattice's own step as slack.
    assert generated.min() >= math.ceil(0.2 * 127)
    assert generated.max() <= 127
    many = gmask_rows(2, STREAM, np.arange(5000), np.zeros(5000, np.int64), 128, CONFIG, SPECIAL)
    lengths = (many.targets != NO_TARGET).sum(1)
    distance = stats.kstest((lengths - 26 + 0.5) / 102, "uniform").statistic
    assert distance < 1.95 / math.sqrt(5000) + 1 / 102  # 1.95 / sqrt(n): the 0.1 % point


def test_row_kinds_are_thirty_seventy(data):
    loader = Loader(data, CONFIG, length=64, seed=0)
    rows = loader.samples(range(3000)).tokens_BT
    special = data.tokenizer.special
    share = float((rows == special.gmask).any(1).float().mean())
    assert abs(share - 0.7) < 5 * math.sqrt(0.21 / 3000)
    whole = (rows == special.gmask).any(1)
    assert not ((rows == special.mask).any(1) & whole).any()


def naive_visible(segments, context, i, j):
    return segments[i] == segments[j] and (j <= i or context[j])


def test_visibility_arrays_say_what_the_definition_says(data):
    loader = Loader(data, CONFIG, length=64, seed=5)
    batch = loader.samples(range(12))
    special = data.tokenizer.special
    for row in range(12):
        tokens, segments = batch.tokens_BT[row].tolist(), batch.segments_BT[row].tolist()
        context, targets = batch.context_BT[row].tolist(), batch.targets_BT[row].tolist()
        for i in range(64):
            # A position with a target must not see its own target's place: the token that it predicts lies behind it, outside any
            # context.
            if targets[i] != NO_TARGET:
                assert not context[i]
            for j in range(64):
                if naive_visible(segments, context, i, j) and j > i:
                    assert segments[i] >= 0
                    assert targets[j] == NO_TARGET
                    assert tokens[j] not in (special.sop, special.pad)


def test_two_dimensional_positions(data):
    two = Loader(data, ObjectiveConfig(positions="2d"), length=64, seed=0).samples([0, 1, 2])
    one = Loader(data, CONFIG, length=64, seed=0).samples([0, 1, 2])
    assert two.positions.shape == (3, 64, 2)
    assert (two.positions[..., 0] == one.positions).all()
    assert ((two.positions[..., 1] > 0) == (one.targets_BT != NO_TARGET)).all()


def test_rows_too_short_for_spans_are_refused(data):
    with pytest.raises(InputError, match="rows of 8 tokens are too short for 4 pieces of at least 3"):
        Loader(data, ObjectiveConfig(), length=8, seed=0)


def test_the_shortest_rows_hold(data):
    rows = Loader(data, ObjectiveConfig(gmask_share=0.0), length=12, seed=0).samples(range(2000))
    assert ((rows.targets_BT != NO_TARGET).sum(1) == 8).all()  # four pieces: [MASK] sop x, target x and eop


@pytest.mark.parametrize("mean", [0.01, 0.5, 1.0, 3.0, 7.3, 33.0, 500.0])
def test_span_lengths_follow_scipys_poisson_without_its_zero(mean):
    """To the bit: training data depends on it."""
    from scipy import stats

    values = np.arange(1, int(stats.poisson.ppf(1 - 1e-12, mean)) + 2)
    weight = stats.poisson.pmf(values, mean)
    expected = (weight / weight.sum()).cumsum()
    expected[-1] = 1.0
    assert np.array_equal(_quantiles(mean)[0], expected)

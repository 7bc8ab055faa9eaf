"""Decoding against full forward passes, brute force and enumeration, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from glm.data.special import SpecialTokens
from glm.errors import InputError
from glm.inference.decoding import Decoder, DecodingConfig, Timing, allowed, distribution, generate
from glm.inference.prompt import Prompt
from glm.model.config import AttentionConfig, EmbeddingConfig, ModelConfig
from glm.model.transformer import Transformer
from tests.glm.inference.conftest import FewTokens

SPECIAL = SpecialTokens()
FEW = FewTokens()
BLANKS = Prompt(
    kind="mask",
    context=(8, SPECIAL.mask, 9, 7, SPECIAL.mask, 8),
    blanks=(1, 4),
    parts=("",) * 3,
    sop=SPECIAL.sop,
)
CONTINUED = Prompt(kind="gmask", context=(8, 9, 7, SPECIAL.gmask), blanks=(3,), parts=("",), sop=SPECIAL.sop)
CAUSAL = Prompt(kind="causal", context=(8, 9, 7), blanks=(), parts=("",), sop=SPECIAL.sop)
PROMPTS = {"mask": BLANKS, "gmask": CONTINUED, "causal": CAUSAL}


def model_of(seed=0, *, vocabulary=12, sharp=6.0, **options):
    torch.manual_seed(seed)
    shape = {"layers": 2, "hidden": 16, "heads": 2, "length": 24, "vocabulary": vocabulary, "norm": "pre"}
    model = Transformer(ModelConfig(**{**shape, **options})).double().eval()
    with torch.no_grad():
        # Larger weights than initial ones: distributions far from uniform.
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
        model.embedding.weight.mul_(sharp / 4)
    return model


def forward(model, layout, *, two):
    """Logits of a layout's last token by a full forward pass, without a cache."""
    tokens = torch.tensor([layout.tokens])
    segments = torch.zeros_like(tokens)
    context = (torch.arange(len(layout)) < layout.context)[None]
    with torch.inference_mode():
        return model(tokens, layout.place_tensor(two=two)[None], segments, context)[0, -1]


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("softmax", ["fp32", "compute", "pb-relax", "fused"])
@pytest.mark.parametrize("positions", ["rope", "rope2d", "alibi", "learned", "none"])
def test_logits_over_a_cache_are_those_of_a_full_forward_pass(positions, softmax, kind):
    two = positions == "rope2d"
    attention = AttentionConfig(positions=positions, softmax=softmax, qk_norm=softmax == "compute")
    model = model_of(attention=attention, embedding=EmbeddingConfig(norm=positions == "alibi"))
    prompt = PROMPTS[kind]
    filled = [(7, 9, 9)] if kind == "mask" else []
    rows = [[7, 8, 9, 7], [9, 9, 8, 8], [8, 7, 7, 9]]
    with torch.inference_mode():
        decoder = Decoder(model, prompt, filled, rows=3, room=4, two=two, timing=Timing())
        for n in range(5):
            for row, tokens in enumerate(rows):
                expected = forward(model, prompt.layout(filled, tokens[:n]), two=two)
                # Sums of a few hundred terms of order 1 to 100, in another order: 1e-16 x 1e2 x 1e2 and room.
                torch.testing.assert_close(decoder.logits_WV[row], expected, rtol=1e-10, atol=1e-10)
            if n < 4:
                if n == 2:  # beams change places
                    order = [2, 0, 0]
                    rows = [rows[i][:n] + rows[row][n:] for row, i in enumerate(order)]
                    decoder.reorder(torch.tensor(order))
                decoder.append(torch.tensor([tokens[n] for tokens in rows]))


def run(model, prompt, config, *, filled=(), limit=5, seed=0, tokenizer=FEW):
    generator = torch.Generator().manual_seed(seed)
    return generate(
        model, prompt, filled, config, tokenizer, two=False, limit=limit, generator=generator, timing=Timing()
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_beam_of_one_is_greedy(seed, penalty):
    model = model_of(seed)
    for prompt in PROMPTS.values():
        greedy = run(model, prompt, DecodingConfig(method="greedy"))
        beam = run(model, prompt, DecodingConfig(method="beam", beams=1, length_penalty=penalty))
        assert (beam.tokens, beam.ended) == (greedy.tokens, greedy.ended)
        # The same sum over the same logits, added up in another order.
        assert math.isclose(beam.log_probability, greedy.log_probability, rel_tol=1e-9)


def every_text(model, prompt, limit, penalty):
    """(value, log P, tokens, end) of every text of at most ``limit`` tokens, its end included."""
    ends, words = (SPECIAL.eop, SPECIAL.eos), (7, 8, 9)
    for n in range(1, limit + 1):
        for tokens in itertools.product(words, repeat=n - 1):
            for last in (*ends, *words) if n == limit else ends:
                total = 0.0
                for i, token in enumerate((*tokens, last)):
                    logits = allowed(forward(model, prompt.layout((), tokens[:i]), two=False), FEW)
                    total += float(logits.log_softmax(-1)[token])
                text = tokens if last in ends else (*tokens, last)
                yield total / ((5 + n) / 6) ** penalty, total, text


@pytest.mark.parametrize(("seed", "penalty"), [(0, 0.0), (1, 0.0), (2, 1.0), (3, 2.0)])
def test_a_wide_beam_finds_the_best_of_all_texts(seed, penalty):
    model = model_of(seed, sharp=3.0)
    best = max(every_text(model, CONTINUED, 3, penalty))
    found = run(model, CONTINUED, DecodingConfig(method="beam", beams=100, length_penalty=penalty), limit=3)
    assert found.tokens == best[2]
    assert math.isclose(found.log_probability, best[1], rel_tol=1e-9)


def nucleus(probabilities, p):
    """The smallest set of tokens with probability p or more, by trying every set; of equal sizes, the most probable."""
    tokens = range(len(probabilities))
    for size in range(1, len(probabilities) + 1):
        sets = itertools.combinations(tokens, size)
        best = max(sets, key=lambda one: sum(probabilities[token] for token in one))
        if sum(probabilities[token] for token in best) >= p:
            return set(best)
    return set(tokens)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("k", "temperature"), [(0, 1.0), (0, 0.5), (3, 2.0)])
def test_top_p_draws_from_the_smallest_sets_by_enumeration(seed, p, k, temperature):
    logits = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    if k:
        least = sorted(weights)[-k]
        weights = [w if w >= least else 0.0 for w in weights]
    probabilities = [w / sum(weights) for w in weights]
    chosen = nucleus(probabilities, p - 1e-12)
    mass = sum(probabilities[token] for token in chosen)
    expected = [q / mass if token in chosen else 0.0 for token, q in enumerate(probabilities)]
    found = distribution(logits, DecodingConfig(method="top-p", top_p=p, top_k=k, temperature=temperature))
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_ties_and_the_smallest_p_leave_one_token():
    config = DecodingConfig(method="top-p", top_p=1e-9)
    assert distribution(torch.zeros(4), config).tolist() == [1, 0, 0, 0]


def test_draws_follow_the_distribution_and_the_seed():
    model = model_of(4, sharp=3.0)
    config = DecodingConfig(method="top-p", top_p=0.8)
    first = allowed(forward(model, CONTINUED.layout(), two=False), FEW)
    expected = distribution(first, config)
    drawn = torch.zeros(12, dtype=torch.float64)
    for seed in range(200):
        span = run(model, CONTINUED, config, limit=1, seed=seed)
        token = span.tokens[0] if span.tokens else {"eop": SPECIAL.eop, "eos": SPECIAL.eos}[span.ended]
        drawn[token] += 1 / 200
    # Of 200 draws a share deviates by at most 0.5 / sqrt(200) in one standard deviation; five of them.
    assert float((drawn - expected).abs().max()) < 5 * 0.5 / math.sqrt(200)
    assert run(model, CONTINUED, config, seed=3) == run(model, CONTINUED, config, seed=3)


def test_no_method_generates_what_no_target_is():
    model = model_of(5, vocabulary=14)  # four numbers are no tokens
    with torch.no_grad():
        for token in (SPECIAL.pad, SPECIAL.mask, SPECIAL.gmask, SPECIAL.sop, 12):
            model.embedding.weight[token] *= 50
    for method in ("greedy", "top-p", "beam"):
        span = run(model, BLANKS, DecodingConfig(method=method, top_p=1.0), filled=[(7,)], limit=12)
        assert set(span.tokens) <= {7, 8, 9}
        assert 1 <= len(span.tokens) + (span.ended != "length") <= 12


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"top_p": 0.0}, "top-p is a probability"),
        ({"top_p": 1.5}, "top-p is a probability"),
        ({"top_k": -1}, "top-k counts tokens"),
        ({"seed": -1}, "seed must be"),
        ({"beams": 0}, "beams must be at least 1"),
        ({"length_penalty": -1.0}, "length-penalty"),
    ],
)
def test_wrong_settings_say_what_to_change(wrong, says):
    with pytest.raises(InputError, match=says):
        DecodingConfig(**wrong)

"""From logits to tokens: greedy, top-p sampling, beam search, with each key and value computed once.

    greedy   the most probable token
    top-p    a draw from the smallest set of most probable tokens whose probabilities reach p (Holtzman et al., 1904.09751),
             after softmax(logits / temperature) and, if asked, after the k most probable alone are kept
    beam     the W most probable beginnings are extended together; an ended one of n tokens, its end included, counts as
             log P / ((5 + n) / 6)^alpha (Wu et al., 1609.08144, equation 14; alpha = 0: log P itself)

A span ends with eop, a text with EOS; the result holds neither. Decoding never generates tokens that are never targets (padding,
masks, sop). Among equal tokens it takes the one of the lower number.

Shapes: W rows (beams), V vocabulary.

Limits: beam search stops when W texts have ended and the best unfinished one scores, at its present length, no more than the worst
of them; with alpha > 0 a longer one might still have overtaken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glm.data.tokenizer import Tokenizer
from glm.errors import InputError
from glm.inference.prompt import Prompt
from glm.model.cache import Cache
from glm.model.transformer import Transformer
from glm.precision import at_least_fp32


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How to choose tokens.

    Attributes:
        method: "greedy", "top-p" or "beam".
        tokens: generate at most this many for each blank.
        temperature: divides the logits (top-p).
        top_p: probability that the candidates reach together (top-p).
        top_k: draw from at most this many candidates; 0: no bound (top-p).
        seed: seed of the draws (top-p).
        beams: W (beam).
        length_penalty: alpha (beam).
    """

    method: Literal["greedy", "top-p", "beam"] = "greedy"
    tokens: int = 64
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    seed: int = 0
    beams: int = 4
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"tokens must be at least 1, got {self.tokens}")
        if not 0 < self.temperature < math.inf:
            raise InputError(
                f"temperature must be positive, got {self.temperature}: for its limit 0 use greedy"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is a probability in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"top-k counts tokens: 0 (no bound) or more, got {self.top_k}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be in [0, 2^63), got {self.seed}")
        if self.beams < 1:
            raise InputError(f"beams must be at least 1, got {self.beams}")
        if not 0 <= self.length_penalty < math.inf:
            raise InputError(f"length-penalty must be 0 (off) or positive, got {self.length_penalty}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The text generated for one blank.

    Attributes:
        tokens: without the end.
        log_probability: of the tokens and the end, in nats, under the model without its never-generated tokens.
        ended: by which token, or for lack of room.
    """

    tokens: tuple[int, ...]
    log_probability: float
    ended: Literal["eop", "eos", "length"]


@dataclass(kw_only=True)
class Timing:
    """Tokens and seconds of prompts read and of tokens generated."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


class Decoder:
    """Continues a row, or several alike: has the logits of the next token, and appends one token at a time.

    Args:
        model: in evaluation mode.
        prompt: the prompt.
        filled: its spans generated before.
        rows: W.
        room: most tokens to add.
        two: 2-D positions.
        timing: adds to it.
    """

    def __init__(
        self,
        model: Transformer,
        prompt: Prompt,
        filled: Sequence[Sequence[int]],
        *,
        rows: int,
        room: int,
        two: bool,
        timing: Timing,
    ) -> None:
        self._model, self._prompt, self._two, self._timing = model, prompt, two, timing
        self._span, self._index = len(filled), 0
        layout = prompt.layout(filled)
        weight = model.embedding.weight
        self._device, length = weight.device, len(layout)
        self._cache = Cache(model.config, rows=rows, length=length + room, like=weight)
        positions = layout.place_tensor(two=two).to(self._device)
        tokens_WT = torch.tensor(layout.tokens, device=self._device).expand(rows, -1)
        visible_W1TS = layout.visible().to(self._device).expand(rows, 1, -1, -1)
        started = time.perf_counter()
        self.logits_WV = self._extend(tokens_WT, positions.expand(rows, *positions.shape), visible_W1TS)
        timing.prefill_tokens += length
        timing.prefill_seconds += time.perf_counter() - started

    def append(self, tokens_W: Tensor) -> None:
        """Add a token to each row; ``logits_WV`` are then those of the next."""
        started = time.perf_counter()
        self._index += 1
        rows = len(tokens_W)
        place = torch.tensor(self._prompt.place(self._span, self._index), device=self._device)
        positions = place.expand(rows, 1, 2) if self._two else place[:1].expand(rows, 1)
        # A token sees all of its row: the context and what was generated before it.
        everything = torch.ones((rows, 1, 1, self._cache.length + 1), dtype=torch.bool, device=self._device)
        self.logits_WV = self._extend(tokens_W[:, None], positions, everything)
        self._timing.decode_tokens += 1
        self._timing.decode_seconds += time.perf_counter() - started

    def reorder(self, rows_W: Tensor) -> None:
        """Row w continues the former row ``rows_W[w]``."""
        self._cache.reorder(rows_W)

    def _extend(self, tokens_WT: Tensor, positions: Tensor, visible_W1TS: Tensor) -> Tensor:
        hidden_WTC = self._model.extend(tokens_WT, positions, visible_W1TS, self._cache)
        return at_least_fp32(self._model.logits(hidden_WTC[:, -1]))


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: Prompt,
    filled: Sequence[Sequence[int]],
    config: DecodingConfig,
    tokenizer: Tokenizer,
    *,
    two: bool,
    limit: int,
    generator: torch.Generator,
    timing: Timing,
) -> Span:
    """Generate the span after the filled ones, ``limit`` tokens at most."""
    rows = config.beams if config.method == "beam" else 1
    decoder = Decoder(model, prompt, filled, rows=rows, room=limit, two=two, timing=timing)
    if config.method == "beam":
        return beam_search(decoder, config, tokenizer, limit)
    special = tokenizer.special
    tokens: list[int] = []
    total = 0.0
    while len(tokens) < limit:
        logits_V = allowed(decoder.logits_WV[0], tokenizer)
        if config.method == "greedy":
            token = int(logits_V.argmax())
        else:
            probability_V = distribution(logits_V, config)
            token = int(torch.multinomial(probability_V.cpu(), 1, generator=generator))
        total += float(logits_V.log_softmax(-1)[token])
        if token == special.eop or token == special.eos:
            return Span(tokens=tuple(tokens), log_probability=total, ended=_end(token, tokenizer))
        tokens.append(token)
        if len(tokens) < limit:
            decoder.append(torch.tensor([token], device=decoder.logits_WV.device))
    return Span(tokens=tuple(tokens), log_probability=total, ended="length")


def distribution(logits_V: Tensor, config: DecodingConfig) -> Tensor:
    """The distribution from which top-p draws, [V] fp64."""
    probability_V = (logits_V.double() / config.temperature).softmax(-1)
    sorted_V, order_V = probability_V.sort(descending=True, stable=True)
    if config.top_k:
        sorted_V[config.top_k :] = 0
        sorted_V /= sorted_V.sum()
    # A token is a candidate unless those before it reach p already.
    sorted_V[sorted_V.cumsum(0) - sorted_V >= config.top_p] = 0
    return torch.zeros_like(probability_V).scatter_(0, order_V, sorted_V / sorted_V.sum())


def beam_search(decoder: Decoder, config: DecodingConfig, tokenizer: Tokenizer, limit: int) -> Span:
    """The best text that ``config.beams`` beginnings reach."""
    W = config.beams
    ends = [tokenizer.special.eop, tokenizer.special.eos]
    texts: list[tuple[int, ...]] = [()] * W
    # All rows are alike at first, so only one counts.
    score_W = torch.full((W,), -math.inf, dtype=torch.float64)
    score_W[0] = 0.0
    ended: list[tuple[float, Span]] = []

    def value(score: float, tokens: int) -> float:
        return score / math.pow((5 + tokens) / 6, config.length_penalty)

    for n in range(1, limit + 1):
        log_WV = allowed(decoder.logits_WV, tokenizer).double().log_softmax(-1).cpu()
        V = log_WV.shape[1]
        candidate = (score_W[:, None] + log_WV).flatten()
        # Enough candidates that W of them do not end.
        best, index = candidate.topk(min(W * (1 + len(ends)), candidate.numel()))
        live: list[tuple[float, int, int]] = []
        for rank, (score, flat) in enumerate(zip(best.tolist(), index.tolist(), strict=True)):
            row, token = divmod(flat, V)
            if score == -math.inf or len(live) == W:
                break
            if token not in ends:
                live.append((score, row, token))
            elif rank < W:
                span = Span(tokens=texts[row], log_probability=score, ended=_end(token, tokenizer))
                ended.append((value(score, n), span))
        ended = sorted(ended, key=lambda one: -one[0])[:W]
        if n == limit:
            for score, row, token in live:
                span = Span(tokens=(*texts[row], token), log_probability=score, ended="length")
                ended.append((value(score, n), span))
        elif not live or (len(ended) == W and value(live[0][0], n) <= ended[-1][0]):
            break
        else:
            live += [(-math.inf, live[0][1], live[0][2])] * (W - len(live))
            texts = [(*texts[row], token) for _, row, token in live]
            score_W = torch.tensor([score for score, _, _ in live], dtype=torch.float64)
            device = decoder.logits_WV.device
            decoder.reorder(torch.tensor([row for _, row, _ in live], device=device))
            decoder.append(torch.tensor([token for _, _, token in live], device=device))
    return max(ended, key=lambda one: one[0])[1]


def allowed(logits: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Logits, [..., V], with -inf for tokens that are never targets, and for those that only pad the vocabulary."""
    special = tokenizer.special
    banned = [special.pad, special.unknown, special.mask, special.gmask, special.sop]
    banned += range(tokenizer.vocabulary, logits.shape[-1])
    return logits.index_fill(-1, torch.tensor(banned, device=logits.device), -math.inf)


def _end(token: int, tokenizer: Tokenizer) -> Literal["eop", "eos"]:
    return "eop" if token == tokenizer.special.eop else "eos"

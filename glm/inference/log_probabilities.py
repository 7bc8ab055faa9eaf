"""How probable a text is, given the text around it.

    log P(t_1 .. t_n | context) = sum_i log P(t_i | context, t_1 .. t_i-1),        in nats

One forward pass gives all of them. In a blank the score includes the span's end, as the objective trained it: P is then a
probability over whole texts, and a short text does not win for being the beginning of a longer one.

Shapes: B rows, T tokens, N scored tokens, C hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm.data.batch import PADDING_SEGMENT
from glm.data.tokenizer import Tokenizer
from glm.errors import InputError
from glm.inference.loading import OpenedModel
from glm.inference.prompt import Prompt, PromptRow, read_prompt
from glm.precision import at_least_fp32

# Tokens of a batch, padding included: enough that the matrix products are large, little enough for any memory.
BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetScore:
    """A target under a model.

    Attributes:
        tokens: the scored ones, with the span's end where it has one.
        log_probabilities: of each, in nats.
        is_greedy: whether each was the most probable one, so that greedy decoding gives the target.
    """

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    is_greedy: bool

    @property
    def total(self) -> float:
        """log P of the target."""
        return sum(self.log_probabilities)

    @property
    def mean(self) -> float:
        """The same per token."""
        return self.total / len(self.log_probabilities)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    number: int
    layout: PromptRow
    scored: tuple[int, ...]


@torch.inference_mode()
def log_probabilities(
    opened: OpenedModel,
    contexts: Sequence[str | Prompt],
    targets: Sequence[str | Sequence[int]],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[TargetScore]:
    """Score each target in its context.

    Args:
        opened: the model.
        contexts: texts with one [MASK], where the target belongs, or texts that the target continues; or prompts.
        targets: texts, or token numbers.
        batch_tokens: tokens of one forward pass, padding included.

    Raises:
        InputError: a context is no prompt for this model or has several blanks, a target is empty, or both together exceed the
            model's positions.
    """
    model, tokenizer, config = opened
    rows = [
        _row(number, _one_blank(context, opened), target, tokenizer, model.config.length)
        for number, (context, target) in enumerate(zip(contexts, targets, strict=True))
    ]
    two = config.objective.positions == "2d"
    found: list[TargetScore | None] = [None] * len(rows)
    for batch in _batches(sorted(rows, key=lambda row: len(row.layout)), batch_tokens):
        for row, score in zip(batch, _score(opened, batch, two=two), strict=True):
            found[row.number] = score
    return [score for score in found if score is not None]


def _one_blank(context: str | Prompt, opened: OpenedModel) -> Prompt:
    if isinstance(context, str):
        context = read_prompt(context, opened.tokenizer, opened.config.objective)
    if context.spans != 1:
        raise InputError(f"a target is scored in one blank, and the context has {context.spans} [MASK]")
    return context


def _row(number: int, prompt: Prompt, target: str | Sequence[int], tokenizer: Tokenizer, length: int) -> _Row:
    tokens = _encode(prompt, target, tokenizer) if isinstance(target, str) else tuple(target)
    if not tokens:
        raise InputError(f"target {number + 1} is empty: give a text")
    # The model need not read the token that it predicts last.
    scored = (*tokens, tokenizer.special.eop) if prompt.kind == "mask" else tokens
    layout = prompt.layout(target=scored[:-1])
    if len(layout) > length:
        raise InputError(
            f"context and target {number + 1} take {len(layout)} tokens of the model's {length} positions: shorten them"
        )
    if layout.context == 0 and len(layout) < len(scored):
        raise InputError(f"context {number + 1} is empty: nothing precedes its target")
    return _Row(number=number, layout=layout, scored=scored)


def _encode(prompt: Prompt, target: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    if prompt.kind == "mask":
        return tuple(tokenizer.encode(target))
    # The tokenizer encodes a continuation together with its text where that leaves the text's own tokens unchanged.
    before = tokenizer.encode(prompt.parts[0])
    both = tokenizer.encode(prompt.parts[0] + target)
    return tuple(both[len(before) :] if both[: len(before)] == before else tokenizer.encode(target))


def _batches(rows: Sequence[_Row], tokens: int) -> Iterator[list[_Row]]:
    """Groups of rows, sorted by length: the longest row times their number stays within ``tokens``."""
    batch: list[_Row] = []
    for row in rows:
        if batch and len(row.layout) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score(opened: OpenedModel, batch: Sequence[_Row], *, two: bool) -> list[TargetScore]:
    model, tokenizer, _ = opened
    B, T = len(batch), max(len(row.layout) for row in batch)
    tokens_BT = torch.full((B, T), tokenizer.special.pad)
    positions = torch.zeros((B, T, 2) if two else (B, T), dtype=torch.int64)
    segments_BT = torch.full((B, T), PADDING_SEGMENT, dtype=torch.int32)
    context_BT = torch.zeros((B, T), dtype=torch.bool)
    scored_BT = torch.zeros((B, T), dtype=torch.bool)
    for b, row in enumerate(batch):
        length = len(row.layout)
        tokens_BT[b, :length] = torch.tensor(row.layout.tokens)
        positions[b, :length] = row.layout.place_tensor(two=two)
        segments_BT[b, :length] = 0
        context_BT[b, : row.layout.context] = True
        scored_BT[b, length - len(row.scored) : length] = True
    device = model.embedding.weight.device
    inputs = (part.to(device) for part in (tokens_BT, positions, segments_BT, context_BT))
    hidden_NC = model.hidden(*inputs)[scored_BT.to(device)]
    target_N = torch.tensor([token for row in batch for token in row.scored], device=device)
    log_N, best_N = _of_targets(model.logits(hidden_NC), target_N)
    counts = [len(row.scored) for row in batch]
    return [
        TargetScore(tokens=row.scored, log_probabilities=tuple(log.tolist()), is_greedy=bool(best.all()))
        for row, log, best in zip(batch, torch.split(log_N, counts), torch.split(best_N, counts), strict=True)
    ]


def _of_targets(logits_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Each target's log-probability, and whether it is the most probable token."""
    logits_NV = at_least_fp32(logits_NV)
    log_N = logits_NV.log_softmax(-1).gather(1, target_N[:, None])[:, 0]
    return log_N, logits_NV.argmax(-1) == target_N

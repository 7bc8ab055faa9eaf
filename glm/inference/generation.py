"""Text in, text out: fills blanks, or continues a text.

    opened = open_model(Path("runs/mine"))
    fill(opened, "The capital of France is[MASK].").text
    fill(opened, "Once upon a time", DecodingConfig(method="top-p", temperature=0.8)).text

``fill`` fills several blanks one after another, in the order of the text; each sees those filled before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glm.data.tokenizer import Tokenizer
from glm.errors import InputError
from glm.inference.decoding import DecodingConfig, Span, Timing, generate
from glm.inference.loading import OpenedModel
from glm.inference.prompt import Prompt, read_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A filled or continued text.

    Attributes:
        text: all of it, with what was generated.
        blanks: the generated text of each blank; one for a continued text.
        spans: the same as tokens, with their log-probabilities and how they ended.
        timing: of reading and generating.
    """

    text: str
    blanks: tuple[str, ...]
    spans: tuple[Span, ...]
    timing: Timing


def fill(opened: OpenedModel, text: str, decoding: DecodingConfig | None = None) -> Filled:
    """Fill the [MASK]s of a text, or continue it where it has none.

    Raises:
        InputError: the text is no prompt for this model (``read_prompt``), or longer than its positions.
    """
    model, tokenizer, config = opened
    decoding = decoding or DecodingConfig()
    prompt = read_prompt(text, tokenizer, config.objective)
    timing = Timing()
    generator = torch.Generator().manual_seed(decoding.seed)
    spans: list[Span] = []
    for number in range(prompt.spans):
        filled = [span.tokens for span in spans]
        room = _room(prompt, filled, model.config.length, prompt.spans - number - 1)
        spans.append(
            generate(
                model,
                prompt,
                filled,
                decoding,
                tokenizer,
                two=config.objective.positions == "2d",
                limit=min(decoding.tokens, room),
                generator=generator,
                timing=timing,
            )
        )
    blanks = _texts(prompt, spans, tokenizer)
    whole = "".join(part + blank for part, blank in zip(prompt.parts, [*blanks, ""], strict=False))
    return Filled(text=whole, blanks=blanks, spans=tuple(spans), timing=timing)


def _room(prompt: Prompt, filled: list[tuple[int, ...]], length: int, later: int) -> int:
    """Tokens that the next span may have; each later one needs its sop and one token."""
    used = len(prompt.layout(filled))
    room = length - used + 1 - 2 * later
    if room < 1:
        raise InputError(
            f"the prompt takes {len(prompt.context)} tokens and the model has {length} positions: "
            "nothing can be generated behind it; shorten it"
        )
    return room


def _texts(prompt: Prompt, spans: list[Span], tokenizer: Tokenizer) -> tuple[str, ...]:
    if prompt.kind == "mask":
        return tuple(
            joined_text(part, span, tokenizer) for part, span in zip(prompt.parts, spans, strict=False)
        )
    # The tokenizer decodes a continuation together with its text, so that no space between the two is lost.
    before = tokenizer.decode(list(prompt.context))
    return (tokenizer.decode([*prompt.context, *spans[0].tokens])[len(before) :],)


def joined_text(before: str, span: Span, tokenizer: Tokenizer) -> str:
    """The text of a span. Decoding drops the space before its first piece; this puts it back between two words."""
    text = tokenizer.decode(list(span.tokens))
    is_word = before[-1:].isascii() and before[-1:].isalnum()
    if is_word and span.tokens and tokenizer.piece(span.tokens[0]).startswith("\u2581"):
        return f" {text}"
    return text

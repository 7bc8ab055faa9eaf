"""A prompt, laid out as the model's objective trained it.

    [MASK]    context with blanks, then each blank in turn:  sop s_1 .. s_n      positions: that of the blank's [MASK]
    [gMASK]   context [gMASK] sop t_1 t_2 ..                                     positions: counting on
    causal    t_1 t_2 ..                                                         positions: counting on

(``glm.data.blanks`` lays out the same rows for training; a test compares the two.) In the first two every token sees the context,
and only later tokens see generated ones. 2-D positions add the place in the span, 1 at its sop, 0 in the context.

The tokenizer encodes text as in multi-task examples: part by part between the blanks, as it stands. In running text put a blank
directly after a word ("the[MASK] that"), as training rows have it: a space before it would be a token of its own.

Limits: a blank sees the blanks filled before it, in the order of the text; training shuffles that order, so the model knows any
order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glm.data.config import ObjectiveConfig
from glm.data.special import GMASK, MASK
from glm.data.tasks import TaskExample
from glm.data.tokenizer import Tokenizer
from glm.errors import InputError

_MASKS = re.compile(r"(\[\w*MASK\])")

Kind = Literal["mask", "gmask", "causal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """Tokens of one row.

    Attributes:
        tokens: token numbers.
        positions: (position, place in the span) of each.
        context: number of tokens at the beginning that every token sees.
    """

    tokens: tuple[int, ...]
    positions: tuple[tuple[int, int], ...]
    context: int

    def __len__(self) -> int:
        return len(self.tokens)

    def place_tensor(self, *, two: bool) -> Tensor:
        """Positions in the model's form: [T], or [T, 2] in the 2-D form."""
        both_T2 = torch.tensor(self.positions, dtype=torch.int64).view(-1, 2)
        return both_T2 if two else both_T2[:, 0]

    def visible(self) -> Tensor:
        """Which token may see which, [T (query), T (key)] bool."""
        T = len(self.tokens)
        return torch.ones(T, T, dtype=torch.bool).tril() | (torch.arange(T) < self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A context, and what the model is to generate.

    Attributes:
        kind: blanks to fill, or a text to continue as [gMASK] or as next tokens.
        context: its token numbers, [MASK] or [gMASK] among them.
        blanks: places of the masks in it; none where the kind is causal.
        parts: the text around the blanks.
        sop: token that begins a span.
    """

    kind: Kind
    context: tuple[int, ...]
    blanks: tuple[int, ...]
    parts: tuple[str, ...]
    sop: int

    @property
    def spans(self) -> int:
        """How many stretches of text the model is to generate."""
        return max(1, len(self.blanks))

    def layout(self, filled: Sequence[Sequence[int]] = (), target: Sequence[int] = ()) -> PromptRow:
        """The row up to where the model predicts the token after ``target``.

        Args:
            filled: the spans generated before, without their eop.
            target: the beginning of the next one.
        """
        tokens = list(self.context)
        positions = [(place, 0) for place in range(len(tokens))]
        spans = [*filled, target]
        for number, span in enumerate(spans):
            opened = [] if self.kind == "causal" else [self.sop]
            positions += [self.place(number, index) for index in range(1 - len(opened), len(span) + 1)]
            tokens += [*opened, *span]
        context = 0 if self.kind == "causal" else len(self.context)
        return PromptRow(tokens=tuple(tokens), positions=tuple(positions), context=context)

    def place(self, span: int, index: int) -> tuple[int, int]:
        """Position and place in the span of a span's token: its sop is token 0, its text begins at 1."""
        if self.kind == "mask":
            return self.blanks[span], index + 1
        if self.kind == "gmask":
            return len(self.context) + index, index + 1
        return len(self.context) + index - 1, 0


def read_prompt(text: str, tokenizer: Tokenizer, objective: ObjectiveConfig) -> Prompt:
    """Read a text as a prompt: blanks where it has [MASK], else a text to continue, with or without [gMASK] at its end.

    Raises:
        InputError: the text is empty, has a mask that the tokenizer or the objective does not know, or [gMASK] before its end.
    """
    parts = _MASKS.split(text)
    masks = parts[1::2]
    for mask in masks:
        if mask not in (MASK, GMASK):
            raise InputError(
                f"the prompt has {mask}, which the tokenizer does not know: use {MASK} or {GMASK}"
            )
    if not "".join(parts[::2]).strip():
        raise InputError("the prompt is empty: give some text beside what is to be generated")
    if objective.kind == "causal":
        if masks:
            raise InputError(
                f"the prompt has {masks[0]}, but the model was trained on next tokens alone: leave it out, the text is continued"
            )
        return _prompt("causal", (text,), tokenizer)
    if MASK in masks and GMASK in masks:
        raise InputError(f"the prompt has both {MASK} and {GMASK}: fill blanks, or continue the text")
    if MASK in masks:
        return _prompt("mask", tuple(parts[::2]), tokenizer)
    if objective.kind == "span-corruption":
        raise InputError(
            f"the model was trained to fill {MASK} alone: put one where text is wanted, for instance at the end"
        )
    if len(masks) > 1 or (masks and parts[-1].strip()):
        raise InputError(f"{GMASK} stands once, at the end of the prompt: what follows it is generated")
    return _prompt("gmask", (parts[0],), tokenizer)


def continuation(text: str, tokenizer: Tokenizer, objective: ObjectiveConfig) -> Prompt:
    """The prompt that asks for a text's continuation, whatever the text spells, in the form that the objective knows."""
    if objective.kind == "span-corruption":
        return _prompt("mask", (text, ""), tokenizer)
    return _prompt("causal" if objective.kind == "causal" else "gmask", (text,), tokenizer)


def task_prompt(example: TaskExample, tokenizer: Tokenizer, objective: ObjectiveConfig) -> Prompt:
    """A multi-task example's prompt as in training; a model of next tokens gets the text before the blank.

    Raises:
        InputError: a model of next tokens cannot see the text after the blank.
    """
    if objective.kind != "causal":
        return _prompt("mask", (example.before, example.after), tokenizer)
    if example.after.strip():
        raise InputError(
            f"task {example.task} has text behind its {MASK}, which a model of next tokens cannot see"
        )
    return _prompt("causal", (example.before,), tokenizer)


def bare_prompt(tokenizer: Tokenizer, objective: ObjectiveConfig) -> Prompt:
    """The prompt that says nothing: a blank alone, or the end of another document."""
    if objective.kind != "causal":
        return _prompt("mask", ("", ""), tokenizer)
    return Prompt(
        kind="causal", context=(tokenizer.special.eos,), blanks=(), parts=("",), sop=tokenizer.special.sop
    )


def _prompt(kind: Kind, parts: tuple[str, ...], tokenizer: Tokenizer) -> Prompt:
    special = tokenizer.special
    first, *others = tokenizer.encode_all(list(parts))
    context, blanks = list(first), []
    for part in others:
        blanks.append(len(context))
        context += [special.mask, *part]
    if kind == "gmask":
        blanks.append(len(context))
        context.append(special.gmask)
    return Prompt(kind=kind, context=tuple(context), blanks=tuple(blanks), parts=parts, sop=special.sop)

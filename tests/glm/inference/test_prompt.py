"""Prompts have the layout of training rows; wrong ones give one clear line."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from glm.data.batch import NO_TARGET
from glm.data.config import ObjectiveConfig
from glm.data.loader import Loader
from glm.data.shards import open_data
from glm.data.tasks import TaskExample
from glm.errors import InputError
from glm.inference.prompt import Prompt, continuation, read_prompt, task_prompt


def pieces(data, objective, rows=6):
    """(tokens, targets, positions [T, 2], context) of every piece of some training rows, padding cut off."""
    two = dataclasses.replace(objective, positions="2d")
    batch = Loader(data, two, length=96, seed=3).samples(range(rows))
    for row in range(rows):
        for segment in range(int(batch.segments_BT[row].max()) + 1):
            at = batch.segments_BT[row] == segment
            yield tuple(
                part[row][at]
                for part in (batch.tokens_BT, batch.targets_BT, batch.positions, batch.context_BT)
            )


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("mask", ObjectiveConfig(gmask_share=0.0, multitask_share=0.0, pieces=2)),
        ("mask", ObjectiveConfig(multitask_share=1.0)),
        ("gmask", ObjectiveConfig(gmask_share=1.0, multitask_share=0.0)),
        ("causal", ObjectiveConfig(kind="causal")),
    ],
)
def test_a_layout_is_the_row_that_was_trained_on(task_data, kind, objective):
    data = open_data(task_data)
    special = data.tokenizer.special
    count = 0
    for tokens, targets, positions, context in pieces(data, objective):
        length = int(context.sum())
        shown = tokens[:length] if length else tokens[:3]
        mask = special.gmask if kind == "gmask" else special.mask
        starts = (tokens == special.sop).nonzero()[:, 0].tolist()
        # What was generated behind each sop, in the order of the row, and the blank it belongs to.
        ends = [*starts[1:], len(tokens)][: len(starts)]
        spans = [tokens[a + 1 : b].tolist() for a, b in zip(starts, ends, strict=True)]
        if kind == "causal":
            blanks, spans = (), [tokens[3:].tolist()]
        elif kind == "gmask":
            blanks = (length - 1,)
        else:
            blanks = tuple(int(positions[start, 0]) for start in starts)
            assert sorted(blanks) == (shown == mask).nonzero()[:, 0].tolist()
        prompt = Prompt(kind=kind, context=tuple(shown.tolist()), blanks=blanks, parts=(), sop=special.sop)
        layout = prompt.layout(spans[:-1], spans[-1])
        assert layout.tokens == tuple(tokens.tolist())
        assert layout.context == length
        assert torch.equal(layout.place_tensor(two=False), positions[:, 0])
        assert torch.equal(layout.place_tensor(two=True), positions)
        if kind == "mask":  # each span is followed by its end, which is not read
            assert [int(targets[end - 1]) for end in ends] == [special.eop] * len(ends)
            assert (targets[:length] == NO_TARGET).all()
        count += 1
    assert count >= 6


def test_texts_are_blanks_or_beginnings(opened):
    tokenizer, objective = opened.tokenizer, opened.config.objective
    special = tokenizer.special
    two = read_prompt("a [MASK] b[MASK]", tokenizer, objective)
    assert (two.kind, two.spans, two.parts) == ("mask", 2, ("a ", " b", ""))
    assert [two.context[place] for place in two.blanks] == [special.mask] * 2
    # Brackets that are no masks are text, and so are special tokens that a text spells.
    text = "see [FOO], [Masked] and <sop> [EOS]"
    plain = read_prompt(text, tokenizer, objective)
    assert plain.kind == "gmask"
    assert plain == read_prompt(text + "[gMASK]", tokenizer, objective)
    assert plain == continuation(text, tokenizer, objective)
    assert plain.context[:-1] == tuple(tokenizer.encode(text))
    assert not set(plain.context[:-1]) & {special.mask, special.sop, special.eos}
    # The training form of a multi-task prompt, token by token.
    example = TaskExample(
        before="Is 3 even? ", after="!", answer="no", choices=(), task="t", language="en", group="g"
    )
    assert task_prompt(example, tokenizer, objective).context == tuple(example.encode_prompt(tokenizer))


GLM, CAUSAL, SPANS = (ObjectiveConfig(kind=kind) for kind in ("glm", "causal", "span-corruption"))


@pytest.mark.parametrize(
    ("text", "objective", "says"),
    [
        ("", GLM, "empty"),
        (" \n", GLM, "empty"),
        ("[MASK]", GLM, "empty"),
        ("[gMASK]", GLM, "empty"),
        ("a [sMASK]", GLM, r"\[sMASK\], which the tokenizer does not know: use \[MASK\] or \[gMASK\]"),
        ("a [MASK] [gMASK]", GLM, r"both \[MASK\] and \[gMASK\]"),
        ("a [gMASK] b", GLM, "stands once, at the end"),
        ("a [gMASK][gMASK]", GLM, "stands once, at the end"),
        ("", CAUSAL, "empty"),
        ("a [MASK]", CAUSAL, "trained on next tokens alone"),
        ("a [gMASK]", CAUSAL, "trained on next tokens alone"),
        ("a", SPANS, r"trained to fill \[MASK\] alone"),
    ],
)
def test_wrong_prompts_are_one_clear_line(opened, text, objective, says):
    with pytest.raises(InputError, match=says) as caught:
        read_prompt(text, opened.tokenizer, objective)
    assert "\n" not in str(caught.value)


def test_models_of_next_tokens_take_tasks_whose_blank_is_at_the_end(opened_causal):
    tokenizer, _ = opened_causal.tokenizer, opened_causal.config
    example = TaskExample(
        before="Is 3 even? ", after="", answer="no", choices=(), task="t", language="en", group="g"
    )
    prompt = task_prompt(example, tokenizer, CAUSAL)
    assert (prompt.kind, prompt.context) == ("causal", tuple(tokenizer.encode("Is 3 even? ")))
    with pytest.raises(InputError, match="cannot see"):
        task_prompt(dataclasses.replace(example, after="."), tokenizer, CAUSAL)

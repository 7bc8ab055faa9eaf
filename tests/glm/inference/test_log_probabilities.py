"""Log-probabilities against a naive full forward pass in float64, and what is computed from them."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from glm.data.config import DataConfig, ObjectiveConfig
from glm.data.loader import Loader
from glm.data.shards import open_data
from glm.data.tasks import open_tasks
from glm.errors import InputError
from glm.inference.cloze import held_out_sentences, last_words
from glm.inference.decoding import DecodingConfig
from glm.inference.generation import fill
from glm.inference.loading import OpenedModel, open_model
from glm.inference.log_probabilities import log_probabilities
from glm.inference.multiple_choice import answer_tasks, wilson
from glm.inference.perplexity import perplexities
from glm.inference.prompt import read_prompt, task_prompt


@pytest.fixture(scope="module")
def wide(run):
    """The run's model in float64, its weights made larger so that its distributions are not flat."""
    model, tokenizer, config = open_model(run)
    model.double()
    with torch.no_grad():
        model.embedding.weight.mul_(4)
    return OpenedModel(model, tokenizer, config)


def naive(opened, prompt, target):
    """log P of each token by one full forward pass a token."""
    found = []
    for n, token in enumerate(target):
        layout = prompt.layout((), target[:n])
        tokens = torch.tensor([layout.tokens])
        context = (torch.arange(len(layout)) < layout.context)[None]
        with torch.inference_mode():
            logits = opened.model(
                tokens, layout.place_tensor(two=False)[None], torch.zeros_like(tokens), context
            )[0, -1]
        found.append(float(logits.log_softmax(-1)[token]))
    return found


CASES = [
    ("训练常常因为[MASK]而中断。", "损失尖峰"),
    ("The[MASK] statement", "import"),
    ("The import statement, with no from clause, is executed", " in two steps"),
    ("Is 7 even? [MASK]", "no"),
    ("大规模语言模型的训练", "常常因为损失尖峰而中断"),
]


@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_scores_are_those_of_naive_forward_passes(wide, batch_tokens):
    contexts, targets = zip(*CASES, strict=True)
    scores = log_probabilities(wide, contexts, targets, batch_tokens=batch_tokens)
    for (context, target), score in zip(CASES, scores, strict=True):
        prompt = read_prompt(context, wide.tokenizer, wide.config.objective)
        expected = naive(wide, prompt, score.tokens)
        # The same products in another batch: float64's 1e-16 over a few hundred terms of order 100.
        assert score.log_probabilities == pytest.approx(expected, rel=1e-10, abs=1e-10)
        assert math.isclose(score.total, sum(expected), rel_tol=1e-10)
        assert math.isclose(score.mean, score.total / len(score.tokens))
        ends = score.tokens[-1] == wide.tokenizer.special.eop
        assert ends == (prompt.kind == "mask")
        assert wide.tokenizer.decode(list(score.tokens)).strip() == target.strip()


def test_the_probabilities_of_all_next_tokens_sum_to_one(wide):
    prompt = read_prompt("The import statement", wide.tokenizer, wide.config.objective)
    every = [(token,) for token in range(wide.tokenizer.vocabulary)]
    scores = log_probabilities(wide, [prompt] * len(every), every)
    assert math.isclose(sum(math.exp(score.total) for score in scores), 1.0, rel_tol=1e-9)
    assert sum(score.is_greedy for score in scores) == 1


def test_what_greedy_decoding_gives_is_greedy_and_has_its_probability(wide):
    # A continuation of the run's text never ends within six tokens here, so tokens and end reason agree.
    text = "The import statement"
    span = fill(wide, text, DecodingConfig(tokens=6)).spans[0]
    prompt = read_prompt(text, wide.tokenizer, wide.config.objective)
    (score,) = log_probabilities(wide, [prompt], [span.tokens])
    other = list(span.tokens)
    other[2] = (other[2] + 1) % wide.tokenizer.vocabulary
    (changed,) = log_probabilities(wide, [prompt], [other])
    assert not changed.is_greedy
    assert changed.log_probabilities[:2] == pytest.approx(score.log_probabilities[:2], rel=1e-10)
    # Generation leaves out tokens that no target ever is, so its probabilities are a little larger.
    assert score.total <= span.log_probability


@pytest.mark.parametrize(
    ("context", "target", "says"),
    [
        ("a [MASK] b [MASK]", "c", r"the context has 2 \[MASK\]"),
        ("a [MASK]", "", "target 1 is empty"),
        ("a [MASK]", "word " * 200, "of the model's 96 positions: shorten them"),
        ("", "c", "empty"),
    ],
)
def test_wrong_contexts_and_targets_are_one_clear_line(opened, context, target, says):
    with pytest.raises(InputError, match=says):
        log_probabilities(opened, [context], [target])


@pytest.mark.parametrize(("correct", "examples"), [(0, 10), (7, 10), (10, 10), (173, 364), (1, 1)])
def test_intervals_are_wilson_s(correct, examples):
    expected = stats.binomtest(correct, examples).proportion_ci(0.95, method="wilson")
    assert wilson(correct, examples) == pytest.approx((expected.low, expected.high), abs=1e-12)


def by_task(examples, task):
    return [example for example in examples if example.task == task]


def test_tasks_are_answered_with_the_most_probable_choice(wide, task_data):
    examples = open_tasks(task_data)
    assert not {e.group for e in examples} & {e.group for e in open_tasks(task_data, "train")}
    examples = [example for task in ("parity-en", "parity-zh") for example in by_task(examples, task)[:4]]
    for normalise in ("none", "length", "prior"):
        results = answer_tasks(wide, examples, normalise=normalise)
        assert [(r.task, r.chance) for r in results] == [("parity-en", 0.5), ("parity-zh", 0.5)]
        for result in results:
            correct = 0
            mine = by_task(examples, result.task)
            for example in mine:
                prompt = task_prompt(example, wide.tokenizer, wide.config.objective)
                values = {}
                for choice in example.choices:
                    tokens = [*wide.tokenizer.encode(choice), wide.tokenizer.special.eop]
                    value = sum(naive(wide, prompt, tokens))
                    if normalise == "length":
                        value /= len(tokens)
                    if normalise == "prior":
                        alone = type(prompt)(
                            kind="mask", context=(3,), blanks=(0,), parts=("", ""), sop=prompt.sop
                        )
                        value -= sum(naive(wide, alone, tokens))
                    values[choice] = value
                correct += max(values, key=values.__getitem__) == example.answer
            assert (result.correct, result.examples, result.too_long) == (correct, len(mine), 0)
            assert result.low < result.accuracy < result.high


def test_a_task_is_cut_to_the_same_examples_of_all_groups(wide, task_data):
    examples = open_tasks(task_data)
    first, second = (
        answer_tasks(wide, given, normalise="none", most=9) for given in (examples, examples[::-1])
    )
    assert first == second
    assert [result.examples for result in first] == [9, 9]
    with pytest.raises(InputError, match="none of the tasks has choices"):
        answer_tasks(wide, [], normalise="none")


def test_perplexity_is_that_of_the_held_out_rows_one_by_one(wide, task_data):
    data = open_data(task_data)
    found = {(one.objective, one.language): one for one in perplexities(wide, data, rows=3)}
    assert {name for name, _ in found} == {"[MASK]", "[gMASK]", "multi-task"}
    objective = ObjectiveConfig(gmask_share=1.0, multitask_share=0.0, pieces=2)
    mixture = DataConfig(mixture=(("en", 1.0),))
    batch = Loader(data, objective, mixture, length=96, seed=0, split="heldout").samples(range(3))
    total = targets = 0.0
    for row in range(3):
        inputs = (batch.tokens_BT, batch.positions, batch.segments_BT, batch.context_BT)
        with torch.inference_mode():
            log = wide.model(*(part[row : row + 1] for part in inputs)).log_softmax(-1)[0]
        for place, target in enumerate(batch.targets_BT[row].tolist()):
            if target >= 0:
                total -= float(log[place, target])
                targets += 1
    en = found["[gMASK]", "en"]
    assert en.targets == targets
    assert math.isclose(en.loss, total / targets, rel_tol=1e-10)
    assert math.isclose(en.perplexity, math.exp(total / targets), rel_tol=1e-9)


def test_models_of_next_tokens_are_evaluated_on_next_tokens(opened_causal, task_data):
    data = open_data(task_data)
    assert {one.objective for one in perplexities(opened_causal, data, rows=2)} == {"next token"}
    assert {one.language for one in last_words(opened_causal, data, most=20)} == {"en", "zh"}


def test_last_words_are_of_held_out_sentences(opened, task_data):
    data = open_data(task_data)
    results = {one.language: one for one in last_words(opened, data, most=30)}
    sentences = held_out_sentences(data, "en", 30)
    assert results["en"].examples == len(sentences) > 5
    assert sentences == held_out_sentences(data, "en", 1000)[: len(sentences)]
    held_out = " ".join(
        data.tokenizer.decode(shard.stream.tolist())
        for shard in data.shards["heldout"]
        if shard.language == "en"
    )
    for before, word in sentences:
        assert word.strip().isalpha()
        assert before + word in held_out

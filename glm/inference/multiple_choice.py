"""Zero-shot tasks: the model's answer is the choice that it finds most probable in the blank.

    none      argmax_c log P(c | prompt)
    length    argmax_c log P(c | prompt) / n_c                            n_c tokens of c, its end included
    prior     argmax_c log P(c | prompt) - log P(c | the blank alone)     (Holtzman et al., 2104.08315)

The examples come from a data folder's held-out groups: the model was trained on no document and no example of theirs. Beside the
accuracy stand that of guessing (the mean of 1 / choices), that of always giving the most frequent answer, and Wilson's interval

    (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)               (Wilson 1927; z = 1.96: 95 %)

A model beats chance where the interval's lower end lies above guessing; above the most frequent answer it also knows more than how
often each answer occurs.

Limits: the interval takes examples as independent; those of one group (a service's documentation) resemble each other.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from glm.data.tasks import TaskExample
from glm.errors import InputError
from glm.inference.loading import OpenedModel
from glm.inference.log_probabilities import log_probabilities
from glm.inference.prompt import Prompt, bare_prompt, task_prompt

Z_95 = 1.959963984540054

Normalise = Literal["none", "length", "prior"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """Accuracy on one task.

    Attributes:
        task, language: of the examples.
        examples: how many the model answered.
        too_long: how many the model's positions could not hold.
        correct: how many it answered rightly.
        chance: accuracy of guessing.
        most_frequent: accuracy of always giving the most frequent answer.
        low, high: 95 % interval of the accuracy.
    """

    task: str
    language: str
    examples: int
    too_long: int
    correct: int
    chance: float
    most_frequent: float
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.examples

    @property
    def beats_chance(self) -> bool:
        return self.low > self.chance

    @property
    def beats_most_frequent(self) -> bool:
        return self.low > self.most_frequent


def wilson(correct: int, examples: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's interval of a share."""
    p, n = correct / examples, examples
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def answer_tasks(
    opened: OpenedModel, examples: Iterable[TaskExample], *, normalise: Normalise, most: int | None = None
) -> list[TaskResult]:
    """Answer every task that has choices, each with ``most`` of its examples at most.

    Raises:
        InputError: none of the examples has choices.
    """
    by_task: dict[str, list[TaskExample]] = {}
    for example in examples:
        if example.choices:
            by_task.setdefault(example.task, []).append(example)
    if not by_task:
        raise InputError("none of the tasks has choices to tell the answer from: give templates a third part")
    return [
        _answer(opened, task, spread_out(found, most), normalise) for task, found in sorted(by_task.items())
    ]


def spread_out(examples: Sequence[TaskExample], most: int | None) -> list[TaskExample]:
    """``most`` of the examples, always the same ones, from all groups alike."""
    if most is None or len(examples) <= most:
        return list(examples)

    def key(example: TaskExample) -> bytes:
        return hashlib.sha256(f"{example.group} {example.prompt}".encode()).digest()

    return sorted(examples, key=key)[:most]


def _answer(opened: OpenedModel, task: str, examples: list[TaskExample], normalise: Normalise) -> TaskResult:
    tokenizer, config = opened.tokenizer, opened.config
    prompts: list[Prompt] = []
    targets: list[tuple[int, ...]] = []
    answered: list[TaskExample] = []
    for example in examples:
        prompt = task_prompt(example, tokenizer, config.objective)
        encoded = [tuple(tokens) for tokens in tokenizer.encode_all(list(example.choices))]
        if len(prompt.layout()) + max(map(len, encoded)) > opened.model.config.length:
            continue
        answered.append(example)
        prompts += [prompt] * len(encoded)
        targets += encoded
    if not answered:
        raise InputError(
            f"none of the {len(examples)} examples of {task} fits the model's {opened.model.config.length} positions"
        )
    values = iter(_values(opened, prompts, targets, normalise))
    correct = 0
    for example in answered:
        of_choices = [next(values) for _ in example.choices]
        correct += example.choices[of_choices.index(max(of_choices))] == example.answer
    low, high = wilson(correct, len(answered))
    frequent = Counter(example.answer for example in answered).most_common(1)[0][1]
    return TaskResult(
        task=task,
        language=examples[0].language or _language_of(task),
        examples=len(answered),
        too_long=len(examples) - len(answered),
        correct=correct,
        chance=sum(1 / len(example.choices) for example in answered) / len(answered),
        most_frequent=frequent / len(answered),
        low=low,
        high=high,
    )


def _values(
    opened: OpenedModel,
    prompts: Sequence[Prompt],
    targets: Sequence[tuple[int, ...]],
    normalise: Normalise,
) -> list[float]:
    scores = log_probabilities(opened, prompts, targets)
    if normalise == "length":
        return [score.mean for score in scores]
    if normalise == "none":
        return [score.total for score in scores]
    different = list(dict.fromkeys(targets))
    alone = bare_prompt(opened.tokenizer, opened.config.objective)
    priors = log_probabilities(opened, [alone] * len(different), different)
    prior = {target: score.total for target, score in zip(different, priors, strict=True)}
    return [score.total - prior[target] for score, target in zip(scores, targets, strict=True)]


def _language_of(task: str) -> str:
    """A translation's language is that of its answers, with which the task's name ends."""
    language = task.rpartition("-")[2]
    return language if language in ("zh", "en") else ""

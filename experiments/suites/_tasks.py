"""A model in training answers held-out multi-task examples."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import torch

from glm.data.shards import open_data
from glm.data.tasks import TaskExample, open_tasks
from glm.inference.loading import OpenedModel
from glm.inference.log_probabilities import log_probabilities
from glm.inference.prompt import task_prompt
from glm.train.loop import Trainer

# Of each task; the first that fit, spread over its groups by the order in which they lie.
MOST = 12


@lru_cache(maxsize=4)
def examples(data: Path, length: int) -> tuple[TaskExample, ...]:
    """Examples with choices that fit into ``length`` positions."""
    tokenizer = open_data(data).tokenizer
    found: dict[str, list[TaskExample]] = defaultdict(list)
    for example in open_tasks(data):
        if not example.choices:
            continue
        longest = max(len(tokenizer.encode(choice)) for choice in example.choices)
        if len(tokenizer.encode(example.prompt)) + longest + 6 <= length:
            found[example.task].append(example)
    chosen = []
    for task in sorted(found):
        step = max(1, len(found[task]) // MOST)
        chosen += found[task][::step][:MOST]
    return tuple(chosen)


@torch.no_grad()
def answers(trainer: Trainer, data: Path) -> dict[str, float]:
    """``accuracy`` by log-probability per token; ``advantage``: the right answer's over the mean wrong one's, nats a token;
    ``answer_loss``: nats a token of right answers."""
    model, tokenizer = trainer.engine.model, open_data(data).tokenizer
    opened = OpenedModel(model.eval(), tokenizer, trainer.config)  # type: ignore[arg-type]
    asked = examples(data, trainer.config.model.length)
    prompts, targets = [], []
    for example in asked:
        prompt = task_prompt(example, tokenizer, trainer.config.objective)
        for choice in example.choices:
            prompts.append(prompt)
            targets.append(tuple(tokenizer.encode(choice)))
    scores = iter(log_probabilities(opened, prompts, targets))
    model.train()
    right, ahead, losses = 0.0, 0.0, 0.0
    for example in asked:
        of = {choice: next(scores).mean for choice in example.choices}
        own = of[example.answer]
        others = [value for choice, value in of.items() if choice != example.answer]
        right += own >= max(of.values())
        ahead += own - sum(others) / len(others)
        losses -= own
    n = len(asked)
    return {"accuracy": right / n, "advantage": ahead / n, "answer_loss": losses / n}

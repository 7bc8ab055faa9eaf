"""Zero-shot tasks in two languages, from a model that two cores train in twenty minutes.

    python -m experiments.benchmarks zero_shot [--folder data/zero_shot] [--seed 0] [--data DIR --run RUN] [--json]

Makes under the folder, where they are missing, the default corpus, a tokenizer of 4,096 pieces, shards that hold out a tenth of the
services, and the run; then answers the held-out tasks by multiple choice (``glm evaluate --parts tasks``), three times:

    trained wording    the held-out services' examples as they are: what they say was never trained on, how they ask was
    new text           of these, only those whose description occurs in no training document and no training example (services
                       repeat each other, so a held-out service's description may stand elsewhere)
    new wording        the same examples asked in words that no training template has (``WORDINGS``, written before any result)

The benchmark compares answers by log-probability per token. A model beats chance on a task when the lower end of Wilson's 95 %
interval does.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from glm.cli import main as glm
from glm.data.documentation_tasks import PROMPTS
from glm.data.shards import TokenData, open_data
from glm.data.tasks import TaskExample, open_tasks
from glm.data.templates import Template
from glm.inference.evaluation import task_table
from glm.inference.loading import open_model
from glm.inference.multiple_choice import TaskResult, answer_tasks
from stabilitylab.errors import InputError

TRAIN = (
    "--steps 2400 --batch.rows 32 --model.layers 4 --model.hidden 128 --model.heads 4 --model.length 128 "
    "--model.norm pre --model.embedding.norm --model.attention.softmax fused "
    "--objective.multitask-share 0.8 --objective.pieces 2 --schedule.peak 3e-3 --schedule.warmup 100 "
    "--monitor.every 0 --monitor.gradients-every 0 --monitor.no-tensorboard "
    "--checkpoint.every 200 --checkpoint.ring 0"
)
SETS = ("trained wording", "new text", "new wording")
WORDINGS = {
    "translate-zh-en": "{{ text }}\n翻译成英语：[MASK]",
    "translate-en-zh": "{{ text }}\nIn Chinese: [MASK]",
    "describe-zh": "请说明 {{ owner }} 中的参数 {{ name }}：[MASK]",
    "describe-en": "Describe the parameter {{ name }} of {{ owner }}: [MASK]",
    "name-zh": "哪个参数的说明是“{{ text }}”？[MASK]",
    "name-en": 'Which parameter is described by "{{ text }}"? [MASK]',
    "match-zh": "参数 {{ name }} 的说明是“{{ text }}”，对吗？[MASK]",
    "match-en": 'Does "{{ text }}" describe the parameter {{ name }}? [MASK]',
    "type-zh": "{{ text }}\n参数 {{ name }} 是什么类型？[MASK]",
    "type-en": "{{ text }}\nWhat type does {{ name }} have? [MASK]",
    "topic-en": '"{{ text }}" belongs to the service [MASK]',
    "required-en": "{{ text }}\nIs {{ name }} mandatory in {{ owner }}? [MASK]",
}
_FIELD = re.compile(r"\{\{ (\w+) \}\}")
_REST = " ||| {{ answer }} ||| {{ choices | join('\n') }}"


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks zero_shot")
    parser.add_argument("--folder", type=Path, default=Path("data/zero_shot"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="shards that stand already")
    parser.add_argument("--run", type=Path, help="a run on them that stands already")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args(argv)
    if (words.data is None) != (words.run is None):
        raise InputError("--data and --run go together: the run must have been trained on those shards")
    data, run = (words.data, words.run) if words.run else make(words.folder, words.seed)
    results = answer(data, run)
    if words.json:
        print(json.dumps({name: [asdict(one) for one in found] for name, found in results.items()}))
    else:
        show(results)
    return 0


def make(folder: Path, seed: int) -> tuple[Path, Path]:
    """Corpus, tokenizer, shards and run, by a user's commands."""
    corpus, tokenizer, shards = (str(folder / name) for name in ("corpus", "tokenizer", "shards"))
    run = folder / f"run-{seed}"
    _run("corpus", "--out", corpus)
    sample = ("--vocabulary", "4096", "--sample-characters", "4000000")
    _run("tokenizer", "--corpus", corpus, "--out", tokenizer, *sample)
    _run("shards", "--corpus", corpus, "--tokenizer", tokenizer, "--out", shards, "--heldout", "0.1")
    resume = ["--resume"] if (run / "config.json").is_file() else []
    _run(
        "train",
        "glm-tiny",
        "--data",
        shards,
        "--out",
        str(run),
        "--seed",
        str(seed),
        *TRAIN.split(),
        *resume,
    )
    return Path(shards), run


def answer(data: Path, run: Path) -> dict[str, list[TaskResult]]:
    """Results by set of examples."""
    opened = open_model(run)
    examples = open_tasks(data)
    trained = set(_trained_texts(open_data(data)))
    everything = "\n".join(trained)
    known: dict[str, bool] = {}

    def is_new(example: TaskExample) -> bool:
        said = fields(example).get("text") or example.answer
        if said not in known:
            known[said] = said in everything
        return not known[said]

    sets = {
        "trained wording": examples,
        "new text": [example for example in examples if is_new(example)],
        "new wording": [reworded(example) for example in examples],
    }
    return {name: answer_tasks(opened, chosen, normalise="length") for name, chosen in sets.items()}


def fields(example: TaskExample) -> dict[str, str]:
    """The values that filled an example's template, read back from its prompt."""
    for source in PROMPTS[example.task]:
        parts = _FIELD.split(source)
        pattern = "".join(
            re.escape(part) if number % 2 == 0 else f"(?P<{part}>.+?)" for number, part in enumerate(parts)
        )
        if match := re.fullmatch(pattern, example.prompt, flags=re.DOTALL):
            return match.groupdict()
    raise InputError(f"the prompt {example.prompt!r} is of none of the templates of {example.task}")


def reworded(example: TaskExample) -> TaskExample:
    """The same example in words that no training template has."""
    record = {**fields(example), "answer": example.answer, "choices": example.choices}
    return Template(WORDINGS[example.task] + _REST, example.task).fill(
        record, task=example.task, language=example.language, group=example.group, where=example.group
    )


def show(results: dict[str, list[TaskResult]]) -> None:
    """Print a table of each set, and how many tasks beat chance in each language."""
    console = Console()
    for name in SETS:
        console.print(task_table(name, results[name]))
        for language in ("zh", "en"):
            above = [one.task for one in results[name] if one.beats_chance and one.language == language]
            said = f"{name}, {language}: {len(above)} tasks beat chance ({', '.join(above)})"
            console.print(said, soft_wrap=True)


def _trained_texts(data: TokenData) -> Iterable[str]:
    for shard in data.shards["train"]:
        offsets = shard.offsets.tolist()
        for first, end in pairwise(offsets):
            yield data.tokenizer.decode(shard.stream[first : end - 1].tolist())
    for example in open_tasks(data.path, "train"):
        yield example.prompt
        yield example.answer


def _run(*words: str) -> None:
    if glm(words):
        raise InputError(f"`glm {' '.join(words)}` failed: see its message above")

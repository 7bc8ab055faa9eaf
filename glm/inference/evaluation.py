"""``glm evaluate``: what a model knows of text outside its training, as tables or as JSON.

    perplexity   of held-out rows, by objective and language            (``perplexity``)
    last words   of held-out sentences, by language                     (``cloze``)
    tasks        zero-shot multiple choice on held-out examples         (``multiple_choice``)

``glm shards`` holds out whole groups (a service's documentation, a book) by a hash of their names, and ``glm train`` never reads
them. Where the model says that it was trained on another data folder, its training may have held what is held out here, and the
report says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from glm.data.files import find_tasks, read_task_records
from glm.data.shards import TokenData, open_data
from glm.data.tasks import TaskExample, open_tasks
from glm.errors import InputError
from glm.inference.cloze import ClozeResult, last_words
from glm.inference.loading import OpenedModel, trained_on
from glm.inference.multiple_choice import Normalise, TaskResult, answer_tasks
from glm.inference.perplexity import Perplexity, perplexities
from stabilitylab.command_line.narrow_tables import print_table

EvaluationPart = Literal["perplexity", "last-words", "tasks"]
PARTS: tuple[EvaluationPart, ...] = ("perplexity", "last-words", "tasks")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation's results.

    Attributes:
        held_out: whether the model was trained on the other split of this very folder; None where it does not say.
        perplexity, last_words, tasks: the parts; empty where not asked for.
        normalise: how answers of different length were compared.
    """

    held_out: bool | None
    perplexity: tuple[Perplexity, ...]
    last_words: tuple[ClozeResult, ...]
    tasks: tuple[TaskResult, ...]
    normalise: Normalise

    def to_json(self) -> str:
        """One JSON object; the tables' computed columns are in it."""
        return json.dumps(
            {
                "held_out": self.held_out,
                "normalise": self.normalise,
                "perplexity": [
                    asdict(one)
                    # JSON has no infinity.
                    | {"perplexity": one.perplexity if math.isfinite(one.perplexity) else None}
                    for one in self.perplexity
                ],
                "last_words": [asdict(one) | {"accuracy": one.accuracy} for one in self.last_words],
                "tasks": [
                    asdict(one)
                    | {
                        "accuracy": one.accuracy,
                        "beats_chance": one.beats_chance,
                        "beats_most_frequent": one.beats_most_frequent,
                    }
                    for one in self.tasks
                ],
            }
        )

    def show(self, console: Console) -> None:
        """Print the tables."""
        if self.perplexity:
            print_table(console, _perplexity_table(self.perplexity))
        if self.last_words:
            print_table(console, _last_words_table(self.last_words))
        if self.tasks:
            print_table(console, task_table("zero-shot tasks, held out", self.tasks))
        if self.held_out is False:
            console.print(
                "[yellow]The model was trained on another data folder: what is held out here may have been trained on there.[/]"
            )


def evaluate_model(
    opened: OpenedModel,
    model: Path,
    data: Path,
    *,
    parts: Sequence[EvaluationPart] | None = None,
    rows: int,
    examples: int | None,
    normalise: Normalise,
    task_files: Sequence[Path] = (),
) -> Evaluation:
    """Evaluate a model on a data folder's held-out split.

    Args:
        opened: the model.
        model: where it was opened.
        data: folder made by ``glm shards`` with the model's tokenizer.
        parts: what to measure; None: everything that the data allows.
        rows: of each objective and language for perplexity.
        examples: at most this many of each task and language; None: all of a task, and 1,000 sentences for last words.
        normalise: compare answers by log-probability per token, by log-probability, or by what the prompt adds to it.
        task_files: your own tasks instead of the folder's, as for ``glm corpus --tasks``.

    Raises:
        InputError: the data have another tokenizer, or hold out nothing that a part needs.
    """
    if parts is not None and not parts:
        raise InputError(f"there is nothing to evaluate: name parts among {', '.join(PARTS)}")
    if rows < 1 or (examples is not None and examples < 1):
        raise InputError("--rows and --examples must be at least 1")
    tokens = open_data(data)
    if tokens.tokenizer.fingerprint != opened.tokenizer.fingerprint:
        raise InputError(
            f"{data} was made with another tokenizer than the model's: make shards of its text with the model's tokenizer.model"
        )
    if parts is None:
        has_tasks = bool(task_files) or "heldout" in tokens.tasks
        parts = PARTS if has_tasks else tuple(part for part in PARTS if part != "tasks")
    origin = trained_on(model)
    return Evaluation(
        held_out=None if origin is None else origin == f"{tokens.fingerprint}/train",
        perplexity=tuple(perplexities(opened, tokens, rows=rows)) if "perplexity" in parts else (),
        last_words=tuple(last_words(opened, tokens, most=examples or 1000)) if "last-words" in parts else (),
        tasks=tuple(
            answer_tasks(opened, _examples(tokens, task_files), normalise=normalise, most=examples)
            if "tasks" in parts
            else ()
        ),
        normalise=normalise,
    )


def _examples(data: TokenData, task_files: Sequence[Path]) -> list[TaskExample]:
    if not task_files:
        return open_tasks(data.path)
    return [example for file in find_tasks(tuple(task_files)) for example in read_task_records(file)]


def _perplexity_table(found: Sequence[Perplexity]) -> Table:
    rows = [
        (
            one.objective.replace("[", r"\["),
            one.language or "all",
            f"{one.targets:,}",
            f"{one.loss:.4f}",
            f"{one.perplexity:,.2f}",
        )
        for one in found
    ]
    return _table(
        "held-out perplexity", ("objective", "language"), ("targets", "nats a token", "perplexity"), rows
    )


def _last_words_table(found: Sequence[ClozeResult]) -> Table:
    rows = [
        (
            one.language,
            f"{one.examples:,}",
            f"{one.accuracy:.3f}",
            f"{one.low:.3f} - {one.high:.3f}",
            f"{one.loss:.3f}",
        )
        for one in found
    ]
    columns = ("sentences", "accuracy", "95 % interval", "nats a word")
    return _table("last words of held-out sentences", ("language",), columns, rows)


def task_table(title: str, found: Sequence[TaskResult]) -> Table:
    """A table of accuracy, interval, and what the interval lies above."""
    rows = [
        (
            one.task,
            one.language or "-",
            f"{one.examples:,}",
            f"{one.accuracy:.3f}",
            f"{one.low:.3f} - {one.high:.3f}",
            f"{one.chance:.3f}",
            f"{one.most_frequent:.3f}",
            _above(one),
        )
        for one in found
    ]
    columns = ("n", "accuracy", "95 % interval", "chance", "frequent", "above")
    return _table(title, ("task", "in"), columns, rows)


def _above(one: TaskResult) -> str:
    """Which of these the interval's lower end exceeds: guessing, and always giving the most frequent answer."""
    if not one.beats_chance:
        return "-"
    return "both" if one.beats_most_frequent else "chance"


def _table(title: str, words: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in words:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table

"""Multi-task examples (MIP): a prompt with one [MASK], the answer that belongs there, and choices to tell it from.

    input   prompt with [MASK]   sop a_1 .. a_n        target  .   a_1 .. a_n eop

Multi-task instruction pre-training (GLM-130B, 2210.02414, section 2.3; ExT5, 2111.10952) trains on 5 % of such tokens. No model
trains on the examples of held-out groups: they are the zero-shot tasks that ``glm evaluate`` scores.

On disk: Parquet, one row an example. A row keeps the prompt as the texts before and after its [MASK], so that no text can pass for
the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from glm.data.record_writer import RecordWriter
from glm.data.shards import SPLITS, check_sha256, open_data
from glm.data.special import MASK
from glm.data.tokenizer import Tokenizer
from glm.errors import InputError

SCHEMA = pa.schema(
    [
        ("before", pa.string()),
        ("after", pa.string()),
        ("answer", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("task", pa.string()),
        ("language", pa.string()),
        ("group", pa.string()),
    ]
)
EXAMPLES_PER_BATCH = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskExample:
    """One example.

    Attributes:
        before, after: the prompt, left and right of its [MASK].
        answer: the right text for the blank.
        choices: answers to choose from, the right one among them; empty where any text may be the answer.
        task: the task's name.
        language: "zh", "en", or "" where unknown or both.
        group: name of a group that is held out as a whole.
    """

    before: str
    after: str
    answer: str
    choices: tuple[str, ...]
    task: str
    language: str
    group: str

    @property
    def prompt(self) -> str:
        """The prompt as it reads."""
        return f"{self.before}{MASK}{self.after}"

    def encode_prompt(self, tokenizer: Tokenizer) -> list[int]:
        """Token numbers of the prompt, [MASK] as the special token."""
        before, after = tokenizer.encode_all([self.before, self.after])
        return [*before, tokenizer.special.mask, *after]


class TaskWriter(RecordWriter[TaskExample]):
    """Writes a file of TaskExamples."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, SCHEMA, batch=EXAMPLES_PER_BATCH)


def read_tasks(file: Path) -> Iterator[TaskExample]:
    """Examples of a Parquet file. Raises InputError where it is damaged."""
    try:
        for batch in pq.ParquetFile(file).iter_batches(EXAMPLES_PER_BATCH, columns=SCHEMA.names):
            for row in batch.to_pylist():
                yield _example(row)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file} is damaged ({str(error).splitlines()[0]}): remove {file.parent} and make it again"
        ) from None


def open_tasks(path: Path, split: str = "heldout") -> list[TaskExample]:
    """The examples of a split of a data folder; with "heldout", those that no model trained on it has seen.

    Raises:
        InputError: the folder holds no data, its tasks were altered, or this split has none.
    """
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}: choose one of {', '.join(SPLITS)}")
    tasks = open_data(path).tasks.get(split)
    if tasks is None:
        raise InputError(
            f"{path} has no tasks in its {split} split: use the default corpus, or glm corpus with --tasks, "
            "and glm shards with a larger --heldout"
        )
    check_sha256(tasks.text, tasks.text_sha256)
    return list(read_tasks(tasks.text))


def _example(row: dict[str, Any]) -> TaskExample:
    return TaskExample(**{**row, "choices": tuple(row["choices"])})

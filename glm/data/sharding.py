"""Tokenizes a corpus into shards, documents and tasks alike.

The hash of a group's name decides whether the group (a service, a book, a user's document) is held out, always as a whole: a model
trains on no sentence of it, neither as text nor in a task. Each source and language has shards of its own, which mixtures weight;
from the 64th pair on they share one.
"""

from __future__ import annotations

import hashlib
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from glm.data.build_once import build_once, progress_bar
from glm.data.documents import Corpus, fingerprint
from glm.data.shards import FORMAT, SPLITS, TokenData, open_data, sha256
from glm.data.tasks import TaskExample, TaskWriter, read_tasks
from glm.data.tokenizer import Tokenizer
from glm.errors import InputError

TOKENS_PER_SHARD = 1 << 27
PER_BATCH = 512
MOST_STRATA = 64
OTHERS = ("others", "")

T = TypeVar("T")
Tell = Callable[[int, str], None]


def build_shards(
    corpus_path: Path, tokenizer_path: Path, out: Path, heldout: float, threads: int
) -> TokenData:
    """Tokenize a corpus into ``out``, or open what is there. Raises InputError for wrong input."""
    if not 0 <= heldout < 1:
        raise InputError(f"--heldout is a share in [0, 1), got {heldout}")
    if threads < 1:
        raise InputError(f"--threads must be at least 1, got {threads}")
    corpus = Corpus.open(corpus_path)
    tokenizer = Tokenizer(tokenizer_path)
    identity = fingerprint([FORMAT, corpus.fingerprint, tokenizer.fingerprint, heldout])

    def work(folder: Path) -> dict[str, Any]:
        dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
        with progress_bar() as progress:
            bar = progress.add_task("shards", total=corpus.characters + corpus.task_characters, said="")

            def tell(characters: int, said: str) -> None:
                progress.update(bar, advance=characters, said=said)

            splits = _write_documents(corpus, tokenizer, folder, dtype, heldout, threads, tell)
            tasks = _write_tasks(corpus, tokenizer, folder, dtype, heldout, threads, tell)
        if not splits["train"]:
            raise InputError(
                "no document is left to train on: lower --heldout, or give more than one document"
            )
        source = tokenizer_path / "tokenizer.model" if tokenizer_path.is_dir() else tokenizer_path
        shutil.copyfile(source, folder / "tokenizer.model")
        return {
            "format": FORMAT,
            "dtype": dtype,
            "vocabulary": tokenizer.vocabulary,
            "tokenizer": tokenizer.fingerprint,
            "splits": splits,
            "tasks": tasks,
        }

    build_once(out, what="shards", made_by="glm shards", fingerprint=identity, work=work)
    return open_data(out)


def is_held_out(group: str, share: float) -> bool:
    """Whether a group belongs to the held-out split: a function of its name alone."""
    digest = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")
    return digest < share * 2**64


def split_of(group: str, heldout: float) -> str:
    """The split a group belongs to."""
    return "heldout" if is_held_out(group, heldout) else "train"


def _write_documents(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, dtype: str, heldout: float, threads: int, tell: Tell
) -> dict[str, list[dict[str, Any]]]:
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    writers: dict[tuple[str, str, str], _ShardWriter] = {}
    strata: set[tuple[str, str]] = set()
    tokens = 0
    for batch in _batches(corpus):
        encoded = tokenizer.encode_all([document.text for document in batch], threads)
        for document, numbers in zip(batch, encoded, strict=True):
            stratum = (document.source, document.language)
            if stratum not in strata:
                stratum = stratum if len(strata) < MOST_STRATA - 1 else OTHERS
                strata.add(stratum)
            key = (split_of(document.group, heldout), *stratum)
            if key not in writers:
                writers[key] = _ShardWriter(folder, entries, *key, dtype)
            writers[key].add([*numbers, tokenizer.special.eos])
            tokens += len(numbers) + 1
        tell(sum(len(document.text) for document in batch), f"{tokens:,} tokens")
    for writer in writers.values():
        writer.close()
    return {split: sorted(found, key=lambda entry: str(entry["file"])) for split, found in entries.items()}


def _write_tasks(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, dtype: str, heldout: float, threads: int, tell: Tell
) -> dict[str, dict[str, Any]]:
    """Write one shard and one Parquet file for each split that has examples."""
    done: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        counts: dict[str, int] = {}
        entries: dict[str, list[dict[str, Any]]] = {f"tasks-{split}": []}
        writer = _ShardWriter(folder, entries, f"tasks-{split}", "", "", dtype, shard_tokens=None)
        text = folder / f"tasks-{split}.parquet"
        with TaskWriter(text) as examples:
            for batch in _batches(_examples(corpus, split, heldout)):
                answers = tokenizer.encode_all([example.answer for example in batch], threads)
                for example, answer in zip(batch, answers, strict=True):
                    writer.add(example.encode_prompt(tokenizer))
                    writer.add(answer)
                    examples.add(example)
                    counts[example.task] = counts.get(example.task, 0) + 1
                tell(sum(len(e.prompt) + len(e.answer) for e in batch), f"{sum(counts.values()):,} examples")
        writer.close()
        if not counts:
            text.unlink()
            continue
        done[split] = {
            **entries[f"tasks-{split}"][0],
            "counts": counts,
            "text": text.name,
            "text_bytes": text.stat().st_size,
            "text_sha256": sha256(text),
        }
    return done


def _examples(corpus: Corpus, split: str, heldout: float) -> Iterator[TaskExample]:
    for file in corpus.task_files():
        for example in read_tasks(file):
            if split_of(example.group, heldout) == split:
                yield example


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


class _ShardWriter:
    """Writes the documents of one split, source and language into shards, and their entries into ``entries``."""

    def __init__(
        self,
        folder: Path,
        entries: dict[str, list[dict[str, Any]]],
        split: str,
        source: str,
        language: str,
        dtype: str,
        shard_tokens: int | None = TOKENS_PER_SHARD,
    ) -> None:
        self._folder, self._entries, self._split = folder, entries, split
        self._source, self._language, self._dtype = source, language, dtype
        self._shard_tokens = shard_tokens
        self._offsets = array("q", [0])
        self._file: IO[bytes] | None = None

    def add(self, tokens: list[int]) -> None:
        if self._file is None:
            self._entry: dict[str, Any] = {
                "file": f"{self._split}-{len(self._entries[self._split]):05d}.tokens",
                "source": self._source,
                "language": self._language,
            }
            # The entry is made at once, so that the next writer's shard has the next number.
            self._entries[self._split].append(self._entry)
            self._path = self._folder / str(self._entry["file"])
            self._file = self._path.open("wb")
        self._file.write(np.asarray(tokens, dtype=self._dtype).tobytes())
        self._offsets.append(self._offsets[-1] + len(tokens))
        if self._shard_tokens is not None and self._offsets[-1] >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        """End the shard; the next document begins another."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        offsets = self._path.with_suffix(".offsets")
        offsets.write_bytes(self._offsets.tobytes())
        self._entry |= {
            "tokens": self._offsets[-1],
            "documents": len(self._offsets) - 1,
            "bytes": self._path.stat().st_size,
            "sha256": sha256(self._path),
            "offsets_bytes": offsets.stat().st_size,
            "offsets_sha256": sha256(offsets),
        }
        self._offsets = array("q", [0])

"""Token shards: a corpus as memory-mapped numbers, with document boundaries and a held-out split.

    train-00000.tokens    token numbers, uint16 (or uint32 for more than 65,536 pieces), documents one after another,
                          each ended by [EOS]; a shard holds one source and language
    train-00000.offsets   int64: where each document begins, and the end
    heldout-00000.tokens  the same for the held-out groups
    tasks-train-...       multi-task examples: prompt and answer are two documents without [EOS], tasks one after another
    tasks-train.parquet   the same as text, with choices (``tasks``)
    tokenizer.model       the tokenizer that made them
    meta.json             sizes, SHA-256 of every file, vocabulary

``open_data`` checks sizes. The first read of a shard in a process checks its checksum, at the speed of SHA-256 (about a second per
gigabyte); checking all on opening would take minutes for a large corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm.data.documents import read_meta
from glm.data.tokenizer import Tokenizer
from glm.errors import InputError

SPLITS = ("train", "heldout")
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens, mapped when first read.

    Attributes:
        path: the .tokens file.
        source, language: of its documents; "" where unknown.
        tokens: how many.
        dtype: uint16 or uint32.
        sha256: checksums of the .tokens and .offsets files.
    """

    path: Path
    source: str
    language: str
    tokens: int
    dtype: str
    sha256: tuple[str, str]

    @cached_property
    def stream(self) -> NDArray[np.unsignedinteger[Any]]:
        """The token numbers. Raises InputError when the file does not match its checksum."""
        check_sha256(self.path, self.sha256[0])
        # As a plain array, since slices of a memmap object cost several microseconds each.
        mapped: NDArray[np.unsignedinteger[Any]] = np.memmap(self.path, dtype=self.dtype, mode="r")
        return mapped.view(np.ndarray)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where documents begin, and the end: one more than there are documents."""
        file = self.path.with_suffix(".offsets")
        check_sha256(file, self.sha256[1])
        return np.fromfile(file, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class TaskShard:
    """Multi-task examples of a split.

    Attributes:
        shard: their tokens; document 2 i is example i's prompt, 2 i + 1 its answer.
        counts: examples of each task, in the order of the shard.
        text: the Parquet file of the same examples.
        text_sha256: its checksum.
    """

    shard: Shard
    counts: Mapping[str, int]
    text: Path
    text_sha256: str


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """A data folder: tokenizer, shards by split, tasks by split (where there are any)."""

    path: Path
    vocabulary: int
    fingerprint: str
    shards: Mapping[str, tuple[Shard, ...]] = field(repr=False)
    tasks: Mapping[str, TaskShard] = field(repr=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards."""
        return Tokenizer(self.path)

    def tokens(self, split: str) -> int:
        """Tokens of a split's documents."""
        return sum(shard.tokens for shard in self.shards[split])


def open_data(path: str | Path) -> TokenData:
    """Open a folder made by ``glm shards``.

    Raises:
        InputError: the folder is no data folder, a file is missing or cut short, or the tokenizer is not the one of the shards.
    """
    path = Path(path)
    meta = read_meta(path, what="shards", made_by="glm shards")
    if meta.get("format") != FORMAT:
        raise InputError(f"{path} was made by another version: remove it and make it again with glm shards")
    try:
        shards = {
            split: tuple(_open_shard(path, entry, meta) for entry in meta["splits"][split])
            for split in SPLITS
        }
        tasks = {}
        for split, entry in meta["tasks"].items():
            text = path / entry["text"]
            _check_size(text, entry["text_bytes"])
            tasks[split] = TaskShard(
                shard=_open_shard(path, entry, meta),
                counts=entry["counts"],
                text=text,
                text_sha256=entry["text_sha256"],
            )
        tokenizer, vocabulary, name = meta["tokenizer"], meta["vocabulary"], meta["fingerprint"]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}/meta.json is damaged ({error}): remove the folder and make it again with glm shards"
        ) from None
    found = Tokenizer(path)
    if found.fingerprint != tokenizer or found.vocabulary != vocabulary:
        raise InputError(
            f"{path}/tokenizer.model is not the one its shards were made with: make them again with glm shards"
        )
    return TokenData(path=path, vocabulary=vocabulary, fingerprint=name, shards=shards, tasks=tasks)


def _open_shard(path: Path, entry: Mapping[str, Any], meta: Mapping[str, Any]) -> Shard:
    file = path / entry["file"]
    _check_size(file, entry["bytes"])
    _check_size(file.with_suffix(".offsets"), entry["offsets_bytes"])
    return Shard(
        path=file,
        source=entry["source"],
        language=entry["language"],
        tokens=entry["tokens"],
        dtype=meta["dtype"],
        sha256=(entry["sha256"], entry["offsets_sha256"]),
    )


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise InputError(f"{file} is missing: make the shards again with glm shards")
    if file.stat().st_size != size:
        raise InputError(
            f"{file} has {file.stat().st_size} bytes of {size}: make the shards again with glm shards"
        )


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raises InputError where a file's checksum differs."""
    if sha256(path) != expected:
        raise InputError(
            f"{path} does not match its checksum: it was altered; make the shards again with glm shards"
        )

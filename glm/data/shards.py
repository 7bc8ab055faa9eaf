"""Token shards: a corpus as memory-mapped numbers, with document boundaries and a held-out split.

    train-00000.tokens    token numbers, uint16 (or uint32 for more than 65,536 pieces), documents one after another,
                          each ended by [EOS]
    train-00000.offsets   int64: where each document begins, and the end
    heldout-00000.tokens  the same for the held-out groups
    tokenizer.model       the tokenizer that made them
    meta.json             sizes, SHA-256 of every file, vocabulary

A group (a service, a book, a document of the user's) is held out as a whole, by the hash of its name, so no sentence of it is
trained on. Sizes are checked when the folder is opened, a shard's checksum when it is first read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from glm.data.building import build_once, progress_bar
from glm.data.documents import Corpus, Document, fingerprint, read_meta
from glm.data.tokenizer import Tokenizer
from glm.errors import InputError

SPLITS = ("train", "heldout")
TOKENS_PER_SHARD = 1 << 27
DOCUMENTS_PER_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens, mapped when first read.

    Attributes:
        path: the .tokens file.
        tokens: how many.
        dtype: uint16 or uint32.
        sha256: checksums of the .tokens and .offsets files.
    """

    path: Path
    tokens: int
    dtype: str
    sha256: tuple[str, str]

    @cached_property
    def stream(self) -> NDArray[np.unsignedinteger[Any]]:
        """The token numbers. Raises InputError when the file does not match its checksum."""
        _check(self.path, self.sha256[0])
        return np.memmap(self.path, dtype=self.dtype, mode="r")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where documents begin, and the end: one more than there are documents."""
        file = self.path.with_suffix(".offsets")
        _check(file, self.sha256[1])
        return np.fromfile(file, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """A data folder: tokenizer and shards by split."""

    path: Path
    vocabulary: int
    fingerprint: str
    shards: dict[str, tuple[Shard, ...]] = field(repr=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards."""
        tokenizer = Tokenizer(self.path)
        if tokenizer.vocabulary != self.vocabulary:
            raise InputError(
                f"{self.path}: tokenizer.model has {tokenizer.vocabulary} pieces but the shards were made with "
                f"{self.vocabulary}: make the shards again with glm shards"
            )
        return tokenizer

    def tokens(self, split: str) -> int:
        """Tokens of a split."""
        return sum(shard.tokens for shard in self.shards[split])


def open_data(path: Path) -> TokenData:
    """Open a folder made by ``glm shards``.

    Raises:
        InputError: it is no such folder, a file is missing or cut short, or the tokenizer is not the one of the shards.
    """
    meta = read_meta(path, what="shards", made_by="glm shards")
    shards: dict[str, tuple[Shard, ...]] = {}
    for split in SPLITS:
        found = []
        for entry in meta["splits"][split]:
            file = path / entry["file"]
            for name, size in (
                (file, entry["bytes"]),
                (file.with_suffix(".offsets"), entry["offsets_bytes"]),
            ):
                if not name.is_file():
                    raise InputError(f"{name} is missing: make the shards again with glm shards")
                if name.stat().st_size != size:
                    raise InputError(
                        f"{name} has {name.stat().st_size} bytes of {size}: make the shards again with glm shards"
                    )
            found.append(
                Shard(
                    path=file,
                    tokens=entry["tokens"],
                    dtype=meta["dtype"],
                    sha256=(entry["sha256"], entry["offsets_sha256"]),
                )
            )
        shards[split] = tuple(found)
    if Tokenizer(path).fingerprint != meta["tokenizer"]:
        raise InputError(
            f"{path}/tokenizer.model is not the one its shards were made with: make them again with glm shards"
        )
    return TokenData(path=path, vocabulary=meta["vocabulary"], fingerprint=meta["fingerprint"], shards=shards)


def build_shards(
    corpus_path: Path, tokenizer_path: Path, out: Path, heldout: float, threads: int
) -> TokenData:
    """Tokenize a corpus into ``out``, or open it where it stands. Raises InputError for wrong input."""
    if not 0 <= heldout < 1:
        raise InputError(f"--heldout is a share in [0, 1), got {heldout}")
    corpus = Corpus.open(corpus_path)
    tokenizer = Tokenizer(tokenizer_path)
    identity = fingerprint([corpus.fingerprint, tokenizer.fingerprint, heldout])

    def work(folder: Path) -> dict[str, Any]:
        dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
        writers = {split: _ShardWriter(folder, split, dtype) for split in SPLITS}
        with progress_bar() as progress:
            bar = progress.add_task("shards", total=corpus.characters, said="")
            for batch in _batches(corpus):
                encoded = tokenizer.encode_all([document.text for document in batch], threads)
                for document, tokens in zip(batch, encoded, strict=True):
                    split = "heldout" if is_held_out(document.group, heldout) else "train"
                    writers[split].add([*tokens, tokenizer.special.eos])
                written = sum(writer.total for writer in writers.values())
                progress.update(bar, advance=sum(len(d.text) for d in batch), said=f"{written:,} tokens")
            splits = {split: writer.close() for split, writer in writers.items()}
        if not splits["train"]:
            raise InputError(
                "no document is left to train on: lower --heldout, or give more than one document"
            )
        source = tokenizer_path / "tokenizer.model" if tokenizer_path.is_dir() else tokenizer_path
        shutil.copyfile(source, folder / "tokenizer.model")
        return {
            "dtype": dtype,
            "vocabulary": tokenizer.vocabulary,
            "tokenizer": tokenizer.fingerprint,
            "splits": splits,
        }

    build_once(out, what="shards", made_by="glm shards", fingerprint=identity, work=work)
    return open_data(out)


def is_held_out(group: str, share: float) -> bool:
    """Whether a group belongs to the held-out split: a function of its name alone."""
    digest = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")
    return digest < share * 2**64


def _batches(corpus: Corpus) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in corpus:
        batch.append(document)
        if len(batch) == DOCUMENTS_PER_BATCH:
            yield batch
            batch = []
    yield batch


class _ShardWriter:
    """Writes one split's documents into shards."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.total = 0
        self._folder, self._split, self._dtype = folder, split, dtype
        self._entries: list[dict[str, Any]] = []
        self._offsets = [0]
        self._file: IO[bytes] | None = None

    def add(self, tokens: list[int]) -> None:
        if self._file is None:
            self._path = self._folder / f"{self._split}-{len(self._entries):05d}.tokens"
            self._file = self._path.open("wb")
        self._file.write(np.asarray(tokens, dtype=self._dtype).tobytes())
        self._offsets.append(self._offsets[-1] + len(tokens))
        self.total += len(tokens)
        if self._offsets[-1] >= TOKENS_PER_SHARD:
            self._finish()

    def close(self) -> list[dict[str, Any]]:
        if self._file is not None:
            self._finish()
        return self._entries

    def _finish(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        offsets = self._path.with_suffix(".offsets")
        offsets.write_bytes(np.array(self._offsets, dtype=np.int64).tobytes())
        self._entries.append(
            {
                "file": self._path.name,
                "tokens": self._offsets[-1],
                "documents": len(self._offsets) - 1,
                "bytes": self._path.stat().st_size,
                "sha256": _sha256(self._path),
                "offsets_bytes": offsets.stat().st_size,
                "offsets_sha256": _sha256(offsets),
            }
        )
        self._offsets = [0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str) -> None:
    if _sha256(path) != expected:
        raise InputError(
            f"{path} does not match its checksum: it was altered; make the shards again with glm shards"
        )

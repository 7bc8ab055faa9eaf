"""A corpus: documents on disk.

A corpus is a folder of Parquet files of documents and a ``meta.json`` that names its sources. A document has

    text      its words
    language  "zh", "en" or "" where unknown
    source    the package or file it came from
    group held out together: a service, a book, a file's document

Reading goes batch by batch, so memory stays bounded however large the corpus is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from glm.data.record_writer import RecordWriter
from glm.errors import InputError

SCHEMA = pa.schema([(name, pa.string()) for name in ("text", "language", "source", "group")])
DOCUMENTS_PER_BATCH = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text."""

    text: str
    language: str
    source: str
    group: str


class DocumentWriter(RecordWriter[Document]):
    """Writes a file of Documents."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, SCHEMA, batch=DOCUMENTS_PER_BATCH)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus folder that is complete.

    Attributes:
        path: the folder.
        documents, characters: how many.
        tasks, task_characters: how many multi-task examples, and characters in them.
        fingerprint: of what it was made from, and how.
    """

    path: Path
    documents: int
    characters: int
    tasks: int
    task_characters: int
    fingerprint: str

    @classmethod
    def open(cls, path: Path) -> Corpus:
        """Raises InputError where there is no complete corpus."""
        meta = read_meta(path, what="corpus", made_by="glm corpus")
        if not meta.get("documents"):
            raise InputError(f"corpus {path} holds no documents: build it again with glm corpus")
        names = ("documents", "characters", "tasks", "task_characters", "fingerprint")
        if missing := [name for name in names if name not in meta]:
            raise InputError(
                f"corpus {path} is of another version (no {', '.join(missing)}): remove it and build it again with glm corpus"
            )
        return cls(path=path, **{name: meta[name] for name in names})

    def files(self) -> list[Path]:
        """Files of documents."""
        return sorted(self.path.glob("documents-*.parquet"))

    def task_files(self) -> list[Path]:
        """Files of examples, one per task."""
        return sorted(self.path.glob("tasks-*.parquet"))

    def __iter__(self) -> Iterator[Document]:
        for file in self.files():
            try:
                for batch in pq.ParquetFile(file).iter_batches(DOCUMENTS_PER_BATCH, columns=SCHEMA.names):
                    for row in batch.to_pylist():
                        yield Document(**row)
            except (pa.ArrowException, OSError) as error:
                raise InputError(
                    f"corpus file {file} is damaged ({str(error).splitlines()[0]}): remove {self.path} and build it again"
                ) from None


def read_meta(path: Path, *, what: str, made_by: str) -> dict[str, Any]:
    """The ``meta.json`` of a finished product. Raises InputError where it is missing or unreadable."""
    file = path / "meta.json"
    if not file.is_file():
        raise InputError(f"{path} is not a finished {what}: it has no meta.json; make it with {made_by}")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{file} is damaged ({error}): remove {path} and make it again with {made_by}"
        ) from None
    if not isinstance(meta, dict) or meta.get("what") != what:
        raise InputError(
            f"{path} is not a {what}: it holds something else; choose the folder made by {made_by}"
        )
    return meta


def fingerprint(parts: Iterable[object]) -> str:
    """A short name of what something was made from."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:16]

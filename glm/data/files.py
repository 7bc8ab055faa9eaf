"""The user's own text and tasks: .txt, .jsonl and .parquet, the first two also as .gz or .zst, read as streams.

    .txt      one document a paragraph group: cut at a blank line once 2,000 characters are reached, or at 20,000 anywhere
    .jsonl    one object a line with "text", and if they are there "language", "source", "group"
    .parquet  the same names as columns

A task is a .jsonl file of records with a template of the same name beside it (``reviews.jsonl``, ``reviews.jinja``; see
``templates``); it uses a record's "language" and "group" where the record has them.

One document bounds the memory. The readers refuse what is not UTF-8 text, or lacks "text", and name its place.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from glm.data.documentation_tasks import PROMPTS
from glm.data.documents import Document
from glm.data.tasks import TaskExample
from glm.data.templates import Template
from glm.errors import InputError

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")
PARAGRAPHS = 2_000
LONGEST = 20_000


def find_files(sources: tuple[Path, ...]) -> list[Path]:
    """All text files among the sources and inside those that are folders. Raises InputError for one that cannot be read."""
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.is_file() and _kind(path))
            if not inside:
                raise InputError(
                    f"{source} holds no text: put .txt, .jsonl or .parquet files there (the first two also .gz, .zst)"
                )
            found += inside
        elif not source.exists():
            raise InputError(f"{source} does not exist: name a text file or a folder of them")
        elif not _kind(source):
            raise InputError(
                f"{source} is of no known kind: give .txt, .jsonl or .parquet (the first two also .gz or .zst)"
            )
        else:
            found.append(source)
    return found


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of one file."""
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet(path)
        return
    with _readable(path), _opened(path) as file:
        yield from _jsonl(path, file) if kind == ".jsonl" else _text(path, file)


def find_tasks(paths: tuple[Path, ...]) -> list[Path]:
    """Task files, each with a template beside it. Raises InputError where one is missing, or two have one name."""
    names: dict[str, Path] = {}
    for path in paths:
        template = path.with_suffix(".jinja")
        if path.suffix != ".jsonl":
            raise InputError(f"{path} is not a task file: give .jsonl files of records")
        for file in (path, template):
            if not file.is_file():
                raise InputError(
                    f"{file} does not exist: a task is a .jsonl file with a .jinja template beside it"
                )
        if not re.fullmatch(r"[\w.-]+", path.stem) or path.stem in PROMPTS:
            raise InputError(
                f"{path}: rename it; a task's name is letters, digits, -, _ and ., and none of the built-in ones"
            )
        if path.stem in names:
            raise InputError(f"{names[path.stem]} and {path} are both task {path.stem!r}: rename one")
        names[path.stem] = path
    return list(names.values())


def read_task_records(path: Path) -> Iterator[TaskExample]:
    """The examples that a task's records make. Raises InputError for a record or template that is wrong."""
    with _readable(path.with_suffix(".jinja")):
        source = path.with_suffix(".jinja").read_text(encoding="utf-8")
    template = Template(source, path.with_suffix(".jinja").name)
    with _readable(path), _opened(path) as file:
        for number, record in _records(path, file):
            yield template.fill(
                record,
                task=path.stem,
                language=str(record.get("language") or ""),
                group=str(record.get("group") or f"{path.name}#{number}"),
                where=f"{path}, line {number}",
            )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Tells in one line what is wrong with a file that is not readable text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start} of a block): convert it, or leave it out"
        ) from None
    except (EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise InputError(
            f"{path} cannot be decompressed ({error}): it is cut short or not what its name says"
        ) from None


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in (".txt", ".jsonl") else ""
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    with path.open("rb") as raw:
        if path.suffix.lower() == ".gz":
            stream: Any = gzip.GzipFile(fileobj=raw)
        elif path.suffix.lower() == ".zst":
            stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        else:
            stream = raw
        yield io.TextIOWrapper(io.BufferedReader(stream, 1 << 20), encoding="utf-8", newline=None)


def _text(path: Path, file: TextIO) -> Iterator[Document]:
    held: list[str] = []
    size = number = 0
    # readline with a bound: it must not read a file without line breaks whole.
    while line := file.readline(LONGEST):
        if "\0" in line:
            raise InputError(f"{path} is binary, not text: it holds a zero byte; leave it out")
        held.append(line)
        size += len(line)
        if (size >= PARAGRAPHS and not line.strip()) or size >= LONGEST:
            yield from _document(path, "".join(held), f"{path.name}#{number}")
            held, size, number = [], 0, number + 1
    yield from _document(path, "".join(held), f"{path.name}#{number}")


def _document(path: Path, text: str, group: str) -> Iterator[Document]:
    if text := text.strip():
        yield Document(text=text, language="", source=path.name, group=group)


def _jsonl(path: Path, file: TextIO) -> Iterator[Document]:
    for number, record in _records(path, file):
        if not isinstance(record.get("text"), str):
            raise InputError(
                f'{path}, line {number} has no "text": each line must be an object with a string "text"'
            )
        yield _from_record(path, record, number)


def _records(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file with their line numbers; skips empty lines."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON ({error}): repair the line") from None
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, line {number} is not an object: write one of the form {{...}} on each line"
            )
        yield number, record


def _parquet(path: Path) -> Iterator[Document]:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if "text" not in names:
            raise InputError(f'{path} has no column "text": its columns are {", ".join(names)}')
        columns = [name for name in ("text", "language", "source", "group") if name in names]
        number = 0
        for batch in file.iter_batches(1024, columns=columns):
            for record in batch.to_pylist():
                if isinstance(record["text"], str):
                    yield _from_record(path, record, number)
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _from_record(path: Path, record: dict[str, object], number: int) -> Document:
    return Document(
        text=str(record["text"]),
        language=str(record.get("language") or ""),
        source=str(record.get("source") or path.name),
        group=str(record.get("group") or f"{path.name}#{number}"),
    )

"""Builds a corpus from the default packages, or from the user's files.

Every source (a package, a file) becomes one Parquet file of documents, or one per task; a killed build resumes after the last
source that it finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm.data import documentation_tasks, packages
from glm.data.build_once import build_once, progress_bar
from glm.data.documents import Corpus, Document, DocumentWriter, fingerprint
from glm.data.files import find_files, find_tasks, read_documents, read_task_records
from glm.data.tasks import TaskExample, TaskWriter
from glm.errors import InputError

TASKS_PER_SERVICE = 24
# A corpus cut short has fewer tasks too: one per service for every ``CHARACTERS_PER_TASK``, but at least 4.
CHARACTERS_PER_TASK = 2_000_000
FORMAT = 2

Tell = Callable[[str], None]
Counts = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents or task examples come from.

    Attributes:
        name: for messages.
        items: opens the stream.
        characters: take at most this many; None: all.
    """

    name: str
    items: Callable[[], Iterator[Document]] | Callable[[], Iterator[TaskExample]]
    characters: int | None = None


def build_corpus(
    sources: tuple[Path, ...], out: Path, max_characters: int | None, tasks: tuple[Path, ...] = ()
) -> Corpus:
    """Make a corpus at ``out``, or open the one that is there.

    Args:
        sources: text files or folders of them; none: the default corpus.
        out: the folder.
        max_characters: stop after about this many.
        tasks: .jsonl files, each with its template beside it.

    Raises:
        InputError: for wrong input.
    """
    if max_characters is not None and max_characters < 1:
        raise InputError(f"--max-characters must be at least 1, got {max_characters}")
    files, task_files = find_files(sources), find_tasks(tasks)
    read = [*files, *task_files, *(path.with_suffix(".jinja") for path in task_files)]
    identity: list[object] = [FORMAT, max_characters]
    identity += [(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns) for path in read]
    if files:
        parts = [Source(name=path.name, items=lambda path=path: read_documents(path)) for path in files]
    else:
        identity += sorted(packages.VERSIONS.items())
        parts = _default_sources(out.with_name(out.name + ".packages"), max_characters)
    parts += [Source(name=path.name, items=lambda path=path: read_task_records(path)) for path in task_files]

    def work(folder: Path) -> dict[str, Any]:
        counts = _write_sources(parts, folder, max_characters)
        if not counts["documents"]:
            names = ", ".join(str(path) for path in sources)
            raise InputError(f"there is no text in {names}: every file is empty")
        return {"format": FORMAT, **counts}

    build_once(out, what="corpus", made_by="glm corpus", fingerprint=fingerprint(identity), work=work)
    return Corpus.open(out)


def _default_sources(cache: Path, max_characters: int | None) -> list[Source]:
    half = None if max_characters is None else max_characters // 2
    quarter = None if half is None else half // 2
    per_service = TASKS_PER_SERVICE
    if max_characters is not None:
        per_service = min(per_service, max(4, max_characters // CHARACTERS_PER_TASK))

    def wheel(name: str) -> Path:
        cache.mkdir(parents=True, exist_ok=True)
        return packages.download(name, cache)

    zh, en, aws = "tencentcloud-sdk-python", "tencentcloud-sdk-python-intl-en", "botocore"
    return [
        Source(
            name="Chinese documentation",
            items=lambda: packages.tencent_documents(wheel(zh), "zh"),
            characters=half,
        ),
        Source(
            name="English documentation",
            items=lambda: packages.tencent_documents(wheel(en), "en"),
            characters=quarter,
        ),
        Source(name="botocore", items=lambda: packages.botocore_documents(wheel(aws)), characters=quarter),
        Source(
            name="bilingual tasks",
            items=lambda: documentation_tasks.tencent_tasks(wheel(zh), wheel(en), per_service),
        ),
        Source(name="botocore tasks", items=lambda: documentation_tasks.aws_tasks(wheel(aws), per_service)),
    ]


def _write_sources(parts: list[Source], folder: Path, max_characters: int | None) -> Counts:
    """Write one file per source or task; keep what a killed build finished."""
    total = {"documents": 0, "characters": 0, "tasks": 0, "task_characters": 0}
    with progress_bar() as progress:
        bar = progress.add_task("corpus", total=len(parts), said="")
        for number, part in enumerate(parts):
            done = folder / f"source-{number:05d}.json"
            if not done.is_file():
                left = None if max_characters is None else max_characters - total["characters"]
                limit = min((n for n in (part.characters, left) if n is not None), default=None)

                def tell(said: str, name: str = part.name) -> None:
                    progress.update(bar, said=f"{name}: {said}")

                done.write_text(json.dumps(_write_source(part, folder, number, limit, tell)))
            counts = json.loads(done.read_text())
            total = {name: total[name] + counts.get(name, 0) for name in total}
            progress.update(bar, advance=1, said=f"{total['characters']:,} characters")
    for note in folder.glob("source-*.json"):
        note.unlink()
    return total


def _write_source(part: Source, folder: Path, number: int, limit: int | None, tell: Tell) -> Counts:
    """Write a source's documents (at most ``limit`` characters) or examples (all of them)."""
    documents = characters = tasks = task_characters = 0
    files: dict[str, Path] = {}
    with ExitStack() as stack:
        writers: dict[str, Any] = {}  # a file has one kind of item
        for item in part.items():
            if isinstance(item, Document):
                if limit is not None and characters >= limit:
                    break
                name = f"documents-{number:05d}"
                documents, characters = documents + 1, characters + len(item.text)
            else:
                name = f"tasks-{item.task}"
                tasks, task_characters = tasks + 1, task_characters + len(item.prompt) + len(item.answer)
            if name not in writers:
                files[name] = folder / f"{name}.parquet"
                partial = files[name].with_suffix(".writing")
                writer: Any = (DocumentWriter if isinstance(item, Document) else TaskWriter)(partial)
                writers[name] = stack.enter_context(writer)
            writers[name].add(item)
            if (documents + tasks) % 2000 == 0:
                tell(f"{characters + task_characters:,} characters")
    for file in files.values():
        file.with_suffix(".writing").replace(file)
    return {
        "documents": documents,
        "characters": characters,
        "tasks": tasks,
        "task_characters": task_characters,
    }

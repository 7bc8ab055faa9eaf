"""Building a corpus: from the default packages, or from the user's files.

Every source (a package, a file) becomes one Parquet file of documents; a build that was killed takes up after the last
source that it finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm.data import packages
from glm.data.building import build_once, progress_bar
from glm.data.documents import Corpus, Document, DocumentWriter, fingerprint
from glm.data.files import find_files, read_documents
from glm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from.

    Attributes:
        name: for messages.
        documents: opens the stream.
        characters: take so many at most; None: all.
    """

    name: str
    documents: Callable[[], Iterator[Document]]
    characters: int | None = None


def build_corpus(sources: tuple[Path, ...], out: Path, max_characters: int | None) -> Corpus:
    """Make a corpus at ``out``, or open it where it stands. Raises InputError for wrong input."""
    if max_characters is not None and max_characters < 1:
        raise InputError(f"--max-characters must be at least 1, got {max_characters}")
    files = find_files(sources)
    if files:
        identity: list[object] = [max_characters]
        identity += [(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        parts = [Source(name=path.name, documents=lambda path=path: read_documents(path)) for path in files]  # type: ignore[misc]
    else:
        identity = ["default", max_characters, sorted(packages.VERSIONS.items())]
        parts = _default_sources(out.with_name(out.name + ".packages"), max_characters)

    def work(folder: Path) -> dict[str, Any]:
        counts = _write_sources(parts, folder, max_characters)
        if not counts["documents"]:
            names = ", ".join(str(path) for path in sources)
            raise InputError(f"there is no text in {names}: every file is empty")
        return counts

    build_once(out, what="corpus", made_by="glm corpus", fingerprint=fingerprint(identity), work=work)
    return Corpus.open(out)


def _default_sources(cache: Path, max_characters: int | None) -> list[Source]:
    half = None if max_characters is None else max_characters // 2

    def open_wheel(name: str) -> Path:
        cache.mkdir(parents=True, exist_ok=True)
        return packages.download(name, cache)

    def chinese() -> Iterator[Document]:
        return packages.tencent_documents(open_wheel("tencentcloud-sdk-python"), "zh")

    def english() -> Iterator[Document]:
        return packages.tencent_documents(open_wheel("tencentcloud-sdk-python-intl-en"), "en")

    def botocore() -> Iterator[Document]:
        return packages.botocore_documents(open_wheel("botocore"))

    quarter = None if half is None else half // 2
    return [
        Source(name="Chinese documentation", documents=chinese, characters=half),
        Source(name="English documentation", documents=english, characters=quarter),
        Source(name="botocore", documents=botocore, characters=quarter),
    ]


def _write_sources(parts: list[Source], folder: Path, max_characters: int | None) -> dict[str, int]:
    """Write one file a source; what a killed build finished is kept."""
    total = {"documents": 0, "characters": 0}
    with progress_bar() as progress:
        bar = progress.add_task("corpus", total=len(parts), said="")
        for number, part in enumerate(parts):
            file = folder / f"documents-{number:05d}.parquet"
            done = file.with_suffix(".json")
            if not done.is_file():
                left = None if max_characters is None else max_characters - total["characters"]
                limit = min((n for n in (part.characters, left) if n is not None), default=None)
                counts = _write_source(part, file, limit, lambda said: progress.update(bar, said=said))
                done.write_text(json.dumps(counts))
            counts = json.loads(done.read_text())
            total = {name: total[name] + counts[name] for name in total}
            progress.update(bar, advance=1, said=f"{total['characters']:,} characters")
    for note in folder.glob("documents-*.json"):
        note.unlink()
    return total


def _write_source(part: Source, file: Path, limit: int | None, tell: Callable[[str], None]) -> dict[str, int]:
    partial = file.with_suffix(".writing")
    documents = characters = 0
    stream = part.documents() if limit is None or limit > 0 else iter(())
    with DocumentWriter(partial) as writer:
        for document in stream:
            writer.add(document)
            documents += 1
            characters += len(document.text)
            if documents % 2000 == 0:
                tell(f"{part.name}: {characters:,} characters")
            if limit is not None and characters >= limit:
                break
    partial.replace(file)
    return {"documents": documents, "characters": characters}

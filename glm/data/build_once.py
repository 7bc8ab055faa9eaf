"""Makes a product once: it is complete or absent, and the same call again does nothing.

Corpus, tokenizer and shards are folders made from inputs and settings. ``build_once`` works in ``NAME.partial`` beside the folder's
place, writes ``meta.json`` last and renames the folder, so a folder of that name is complete. A second call with the same inputs
and settings finds their fingerprint in ``meta.json`` and does nothing; with others it refuses, and does not overwrite what another
call made.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from glm.data.documents import read_meta
from glm.errors import InputError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]


def build_once(
    out: Path, *, what: str, made_by: str, fingerprint: str, work: Callable[[Path], dict[str, Any]]
) -> bool:
    """Make ``out`` unless it exists. ``work`` fills the folder that it receives and returns what ``meta.json`` is to hold.

    Returns:
        Whether it made the product.

    Raises:
        InputError: ``out`` holds something else, or another process is making it.
    """
    if out.exists():
        meta = read_meta(out, what=what, made_by=made_by)
        if meta.get("fingerprint") == fingerprint:
            return False
        raise InputError(
            f"{out} holds a {what} made from other inputs or settings: remove it, or choose another --out"
        )
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _alone(partial, out):
        # A part made for other settings is of no use; work on one made for these goes on where it stopped.
        begun = partial / "fingerprint"
        if not (begun.is_file() and begun.read_text() == fingerprint):
            for path in partial.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            begun.write_text(fingerprint)
        with _room(partial):
            meta = {"what": what, "fingerprint": fingerprint, **work(partial)}
            begun.unlink()
            (partial / "meta.json").write_text(
                json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8"
            )
        (partial / ".lock").unlink()
        partial.replace(out)
    return True


@contextmanager
def _room(partial: Path) -> Iterator[None]:
    """Tells in one line of a full disk, or of a file too large for it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"there is no room to write {partial} ({os.strerror(error.errno)}): free some space and run the same command again"
            ) from None
        raise


@contextmanager
def _alone(partial: Path, out: Path) -> Iterator[None]:
    lock = (partial / ".lock").open("w")
    try:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{out} is being made by another process: wait for it, or choose another --out"
                ) from None
        yield
    finally:
        lock.close()


def progress_bar() -> Progress:
    """The bar of the three commands, on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

"""Writes a file whole or not at all: under a name of its own first, which then takes the file's place.

Whoever reads the file meanwhile sees the old one. After an error or an interrupt nothing half-written is left.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from stabilitylab.errors import REFUSED_PATH, InputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the path to write to in this context; what was written there becomes the file at its end.

    A device or a named pipe (``/dev/stdout``) is written as it is, a symbolic link's target is replaced.

    Raises:
        InputError: the place may not be written, or is no file's.
        OSError: anything else, a full disk above all; it names the file, which writes to an open file do not.
    """
    target = Path(os.path.realpath(path))
    # Cut, since a file's name may be as long as the system allows.
    partial = target.with_name(f".{target.name[:64]}.{os.getpid()}.partial")
    try:
        if _is_stream(path):
            yield path
            return
        try:
            yield partial
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        # Of something that the writer read.
        if error.filename not in (None, str(partial), str(target), str(path)):
            raise
        if error.errno in (*REFUSED_PATH, errno.ENOENT):
            raise InputError(
                f"cannot write {path}: {os.strerror(error.errno)}; choose another place"
            ) from None
        error.filename = str(path)
        raise


def told_beside(path: Path) -> TextIO:
    """Where to say that the file is written: standard output, or standard error where the file is a stream (``/dev/stdout``), which
    would end in that sentence."""
    return sys.stderr if _is_stream(path) else sys.stdout


def _is_stream(path: Path) -> bool:
    """Whether the path is a device, a pipe or a socket."""
    return path.exists() and not (path.is_file() or path.is_dir())

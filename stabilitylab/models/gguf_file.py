"""GGUF files, opened once: which file, and a reader that transformers' loader asks three times but that reads one time.

transformers builds a reader for the config, for the weights and for the tokenizer, and each walks through the whole vocabulary in
slices of ``numpy.memmap``, whose every slice runs Python code; for each module of the model it builds gguf's table of names anew.
So while a file is open here, one reader serves all, over a plain array on the same mapped pages, and each table is made once.
Measured on SmolLM2-135M (49,152 tokens): see experiments/RESULTS.md.

A model split over several files (``NAME-00001-of-00003.gguf``) is refused as a whole: loaders look at one part and take
the rest for missing or tied.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from stabilitylab.errors import InputError

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def only_file(folder: Path) -> Path | None:
    """The GGUF file of a folder; None where it holds none.

    Raises:
        InputError: it holds several.
    """
    files = sorted(folder.glob("*.gguf"))
    if not files:
        return None
    whole_file(files[0])
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise InputError(f"{folder} holds {len(files)} GGUF files ({names}): give one of them")
    return files[0]


def whole_file(file: Path) -> Path:
    """The file itself.

    Raises:
        InputError: it is a part of a split one.
    """
    part = _PART.search(file.name)
    if part and int(part[2]) > 1:
        raise InputError(
            f"{file} is part {int(part[1])} of {int(part[2])} of a model: join them first "
            f"(llama-gguf-split --merge FIRST_PART OUT.gguf)"
        )
    return file


@contextmanager
def opened_once() -> Iterator[None]:
    """While this lasts, gguf's readers and tables of names are made once for each file and architecture."""
    try:
        import gguf
    except ImportError:  # transformers will say so
        yield
        return

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """Slices of a plain array instead of ``numpy.memmap``'s, on the same pages."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = functools.cache(Reader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before

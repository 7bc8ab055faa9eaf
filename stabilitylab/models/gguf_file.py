"""Opens GGUF files once: says which file, and reads it one time where transformers' loader asks for a reader three times.

transformers builds a reader for the config, for the weights and for the tokenizer. Each walks through the whole vocabulary in
slices of ``numpy.memmap``, and every slice runs Python code; for each module of the model it builds gguf's table of names anew. So
while a file is open here, one reader serves all, over a plain array on the same mapped pages, and each table is made once. Measured
on SmolLM2-135M (49,152 tokens): see experiments/RESULTS.md.

A matrix as large as a vocabulary is dequantized some rows at a time, into the model's own format: gguf and transformers hold it in
fp32 three times.

Pages of the file that were read count as the process's own until it lets them go. So we let them go tensor by tensor: else the
whole file stands in memory beside the model that was made of it.

A model split over several files (``NAME-00001-of-00003.gguf``) is refused as a whole: loaders look at one part and take the rest
for missing or tied.
"""

from __future__ import annotations

import functools
import gc
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.models.freed_memory import give_back_memory

_ROWS = 2048  # dequantized together
_VOCABULARY = 1 << 15  # rows from which on a matrix is a table of words, which no loader turns around
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
def opened_once(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """While this lasts, gguf's readers and tables of names are made only once for each file and architecture.

    Args:
        dtype: the model's format; tables as large as a vocabulary are dequantized to it some rows at a time.
    """
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
            self._data, self._file = mapped.view(np.ndarray), mapped

        @property
        def tensors(self) -> list[Any]:
            return self._tensors

        @tensors.setter
        def tensors(self, found: list[Any]) -> None:
            self._tensors = _LetGo(found)
            self._tensors.file = self._file

    before = gguf.GGUFReader, gguf.get_tensor_name_map, gguf.dequantize, torch.from_numpy
    gguf.GGUFReader = functools.cache(Reader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    gguf.dequantize = functools.partial(_dequantized, gguf.dequantize, dtype)
    torch.from_numpy = functools.partial(_from_numpy, torch.from_numpy)
    try:
        with _lazily_let_go():
            yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, gguf.dequantize, torch.from_numpy = before


def forget_words(file: Path) -> None:
    """Let go of what an open file says of its tokenizer, once that is made: a quarter of a gigabyte for 262,144 pieces."""
    import gguf

    fields = gguf.GGUFReader(str(file)).fields
    for name in [name for name in fields if name.startswith("tokenizer.")]:
        del fields[name]
    gc.collect()
    give_back_memory()


class _Dequantized(np.ndarray[Any, Any]):
    """Numbers that were made for whoever asks, so that copying them copies nothing."""

    tensor: Tensor | None = None  # the numbers themselves, where they are in a format that numpy has not

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is np.copy:
            return self
        return super().__array_function__(func, types, args, kwargs)


def _dequantized(dequantize: Any, dtype: torch.dtype, data: Any, kind: Any) -> Any:
    """As gguf's ``dequantize``, some rows at a time: gguf makes a list of all rows, and one array of that."""
    if data.dtype != np.uint8 or data.ndim != 2 or len(data) <= _ROWS:
        return dequantize(data, kind)
    first = dequantize(data[:1], kind)
    narrow = dtype in (torch.bfloat16, torch.float16) and len(data) >= _VOCABULARY
    wide = np.empty((0 if narrow else len(data), first.shape[1]), dtype=first.dtype)
    made = torch.empty(len(data), first.shape[1], dtype=dtype) if narrow else torch.from_numpy(wide)
    for start in range(0, len(data), _ROWS):
        part = slice(start, start + _ROWS)
        made[part] = torch.from_numpy(dequantize(data[part], kind))
    found = wide.view(_Dequantized)
    found.tensor = made if narrow else None
    return found


def _from_numpy(from_numpy: Any, array: Any) -> Tensor:
    tensor = getattr(array, "tensor", None)
    made: Tensor = from_numpy(array) if tensor is None else tensor
    return made


class _LetGo(list[Any]):
    """A file's tensors; a loop over them lets the pages of each go when it comes to the next."""

    file: Any = None

    def __iter__(self) -> Iterator[Any]:
        for tensor in super().__iter__():
            yield tensor
            let_go(tensor.data, self.file)


@contextmanager
def _lazily_let_go() -> Iterator[None]:
    """The same for tensors that transformers, from 5.23 on, reads one by one without gguf's reader."""
    try:
        from transformers.integrations.gguf.reader import LazyGgufTensor
    except ImportError:
        yield
        return
    read = LazyGgufTensor.__getitem__

    def read_and_let_go(self: Any, at: Any) -> Any:
        found = read(self, at)  # a copy
        let_go(self.data, self.data)
        return found

    LazyGgufTensor.__getitem__ = read_and_let_go
    try:
        yield
    finally:
        LazyGgufTensor.__getitem__ = read


def let_go(part: Any, mapped: Any) -> None:
    """Let the pages of a part of a mapped file go; who reads them again gets them from the file again.

    Args:
        part: array on the file's pages.
        mapped: the file's ``numpy.memmap``, or a slice of it.
    """
    pages = getattr(mapped, "_mmap", None)
    if pages is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = part.ctypes.data - np.frombuffer(pages, dtype=np.uint8).ctypes.data
    if 0 <= start < len(pages):
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        pages.madvise(mmap.MADV_DONTNEED, first, start + part.nbytes - first)

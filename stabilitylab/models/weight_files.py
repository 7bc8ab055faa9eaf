"""What the weight files of a folder hold, told from their headers alone: name, number format and shape of every tensor.

A safetensors file opens with the length of its header, 8 bytes little-endian, and the header, JSON that maps each name to its
``dtype``, ``shape`` and place. Nothing is loaded, so a checkpoint of any size is looked over in milliseconds.

Source: the format's own description, https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabilitylab.errors import InputError

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_LONGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: in the file.
        dtype: as the format calls it: "BF16", "F8_E4M3", "U8", ...
        shape: as stored.
        file: where.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def size(self) -> int:
        """How many numbers of that format it is."""
        return math.prod(self.shape)

    @property
    def is_matrix_of_codes(self) -> bool:
        """Whether it is a weight whose numbers mean nothing without something beside them.

        Integers of 64 bits are none: those are indices, such as the ``position_ids`` that checkpoints of encoders carry.
        """
        return len(self.shape) > 1 and self.dtype not in {*FLOATS, "BOOL", "I64", "U64"}


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's safetensors, by name; empty where it holds none.

    Raises:
        InputError: a file that the index names is missing, or a header cannot be read.
    """
    found: dict[str, StoredTensor] = {}
    files, indexed = _files(folder)
    for file in files:
        for name, entry in _header(file).items():
            if name in found:
                raise InputError(
                    f"{folder}: {found[name].file.name} and {file.name} both hold {name}, and which is meant is not said: give the "
                    "checkpoint as it was saved"
                )
            found[name] = StoredTensor(
                name=name, dtype=entry["dtype"], shape=tuple(entry["shape"]), file=file
            )
    if lost := sorted(indexed - found.keys()):
        raise InputError(
            f"{folder} lacks {lost[0]}, which its index promises ({len(lost)} in all): give the whole checkpoint"
        )
    return found


def _files(folder: Path) -> tuple[list[Path], set[str]]:
    """The files that transformers reads, one or those that the index names; and the tensors that the index promises.

    Raises:
        InputError: both are there, or a file is missing.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.is_file():
        return ([whole] if whole.is_file() else []), set()
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise InputError(f"{index} is no index of weight files: give the whole checkpoint") from None
    # A name is a file of this folder, wherever an index would like it to lead.
    files = [folder / Path(str(name)).name for name in names]
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder} lacks {file.name}, which its index names: give the whole checkpoint")
    if whole.is_file() and whole not in files:
        raise InputError(
            f"{folder} holds {whole.name} and an index of other files: take away whichever is not meant"
        )
    return files, set(weight_map)


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError
            header = json.loads(opened.read(length))
        return {name: dict(entry) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, TypeError, AttributeError):
        raise InputError(
            f"{file.parent}: cannot read its weights ({file.name} is no safetensors file)"
        ) from None

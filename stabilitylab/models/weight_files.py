"""What the weight files of a folder hold, read from their headers alone: name, number format and shape of every tensor.

A safetensors file opens with the length of its header, 8 bytes little-endian, and the header, JSON that maps each name to its
``dtype``, ``shape`` and place. Nothing is loaded, so looking over a checkpoint of any size takes milliseconds.

Source: the format's own description, https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stabilitylab.errors import InputError

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
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
        InputError: the folder holds a whole file and an index of others, or a file is missing.
    """
    whole, index = folder / _WHOLE, folder / _INDEX
    if not index.is_file():
        return ([whole] if whole.is_file() else []), set()
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise InputError(f"{index} is not an index of weight files: give the whole checkpoint") from None
    # A name is a file of this folder, wherever the index would have it lead.
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
        found = {name: dict(entry) for name, entry in header.items() if name != "__metadata__"}
        ends = 8 + length + max((int(entry["data_offsets"][1]) for entry in found.values()), default=0)
        size = file.stat().st_size
    except (OSError, ValueError, struct.error, TypeError, AttributeError, KeyError, IndexError):
        raise InputError(
            f"{file.parent}: cannot read its weights ({file.name} is not a safetensors file): give the whole, intact checkpoint"
        ) from None
    if size != ends:
        what = (
            f"is cut off: {size:,} bytes of {ends:,}"
            if size < ends
            else f"has {size - ends:,} bytes too many"
        )
        raise InputError(f"{file.parent}: {file.name} {what}; give the whole, intact checkpoint")
    return found


def unnamed_files(folder: Path) -> tuple[str, ...]:
    """A note on parts of a checkpoint that no index names: nothing reads them."""
    read = {file.name for file in _files(folder)[0]}
    if not read:
        return ()
    names = sorted(file.name for file in folder.glob("*.safetensors") if _SHARD.search(file.name))
    left = [name for name in names if name not in read]
    if not left:
        return ()
    many = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    return (f"{left[0]}{many} is a part of a checkpoint that no index of this folder names: it is not read",)


def require_weights(folder: Path) -> None:
    """Raises InputError where a folder has no weights under a name that is looked for, with what there is instead."""
    if any((folder / name).is_file() for name in (_WHOLE, _INDEX, _PICKLED, _PICKLED_INDEX)):
        return
    others = sorted(
        file.name
        for kind in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
        for file in folder.glob(kind)
    )
    there = (
        f"holds {others[0]}" + (f" and {len(others) - 1} more" if len(others) > 1 else "")
        if others
        else "holds no weights"
    )
    way = (
        "give the .gguf file itself"
        if others and others[0].endswith(".gguf")
        else (
            f"of parts give {_INDEX} too; a whole file is called {_WHOLE}"
            if others
            else "give the whole checkpoint"
        )
    )
    raise InputError(f"{folder} {there}, and no {_WHOLE} or {_INDEX}: {way}")


def refuse_almost_known(folder: Path) -> None:
    """Raises InputError for a folder that is nearly one of transformers, with what it is instead or lacks."""
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds an adapter alone (adapter_config.json), and no model: merge it into its base first (peft's "
            "merge_and_unload), and give the merged folder"
        )
    config = folder / "config.json"
    if config.is_file():
        try:
            held = json.loads(config.read_text(encoding="utf-8"))
            wrong = (
                "says no model_type and no architectures" if isinstance(held, dict) else "is no JSON object"
            )
        except (OSError, ValueError) as error:
            wrong = f"cannot be read ({str(error).splitlines()[0]})"
        raise InputError(f"{config} {wrong}: give the model's own config.json")


def pickled_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's pickled weights, by name, as ``stored_tensors`` tells those of safetensors; reads no number.

    Empty where there are none, or none that can be read: whoever loads them says why.
    """
    index = folder / _PICKLED_INDEX
    try:
        names = [_PICKLED]
        if not (folder / _PICKLED).is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / Path(str(name)).name for name in names]
        held = [(file, _on_paper(file)) for file in files]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ):
        return {}
    return {
        name: StoredTensor(name=name, dtype=_called(tensor.dtype), shape=tuple(tensor.shape), file=file)
        for file, tensors in held
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }


def _on_paper(file: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a pickle that is no checkpoint: whoever loads it refuses it
        found = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    return found if isinstance(found, dict) else {}


def _called(dtype: torch.dtype) -> str:
    """A number format by safetensors' name; one that no float weights have needs only a name of its own."""
    known = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    whole = {torch.int64: "I64", torch.bool: "BOOL"}
    return known.get(dtype) or whole.get(dtype) or str(dtype).removeprefix("torch.")

"""Keeps quantized weights on disk: plans are verified and applied out of the files' own pages, without rounding again.

    FOLDER/<digest of layer and scheme>.safetensors    buffers of the quantized layer, its layout in the header

A plan's folder is next to it and has its name, with ``.rounded`` in place of ``.json``. When the plan is made, only weights that
were rounded for a text's inputs stay there: all others can be made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.quantization.calibrated import needs_moments
from stabilitylab.quantization.format_scheme import fingerprint_of_weight
from stabilitylab.quantization.schemes import LinearScheme
from stabilitylab.quantization.twin_files import read_twin, twin_layout

_HEADER = "stabilitylab-rounded"
_PREFIX = "layer"
_PARTIAL = "partial"


@dataclass(frozen=True, kw_only=True)
class RoundedScheme:
    """A scheme whose rounded weights of one layer are in a file.

    Attributes:
        name: of the scheme.
        file: where the weights are.
    """

    name: str
    file: Path

    def layer(
        self,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        largest: Tensor | None = None,
        name: str = "the layer",
    ) -> Any:
        """The layer from the file.

        Raises:
            InputError: there is no such file, or it was made from another weight.
        """
        try:
            with safe_open(self.file, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
                names: list[str] = file.keys()
        except (OSError, SafetensorError, ValueError):
            header = None
        if not isinstance(header, dict):
            raise InputError(
                f"{name}: the weights that {self.name} rounded are not in {self.file}: keep the folder beside the plan, or make "
                "the plan anew"
            )
        if header["weight"] != fingerprint_of_weight(weight):
            raise InputError(f"{name}: {self.file} was rounded from another weight: make the plan again")
        twin: Any = read_twin(
            self.file, set(names), _PREFIX, header, torch.float32 if bias is None else bias.dtype
        )
        return twin.to(weight.device)


def dear(scheme: LinearScheme) -> bool:
    """Whether rounding, for inputs or with searched scales, takes so long that a layer is kept from the first time on."""
    inner = getattr(scheme, "inner", scheme)
    return needs_moments(scheme) or bool(getattr(inner, "search", False))


class RoundedWeights:
    """A folder of rounded weights.

    Args:
        folder: made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, path: str, scheme: LinearScheme, twin: Any, weight: Tensor) -> None:
        """Keep a layer, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{_PREFIX}.{name}": tensor.contiguous() for name, tensor in twin.state_dict().items()}
        header = {**twin_layout(path, twin, scheme.name), "weight": fingerprint_of_weight(weight)}
        partial = self.folder / _PARTIAL
        save_file(tensors, partial, metadata={_HEADER: json.dumps(header)})
        os.replace(partial, self._file(path, scheme.name))

    def found(self, path: str, scheme: LinearScheme, weight: Tensor, bias: Tensor | None = None) -> Any:
        """A layer that was kept; None where there is none of this weight."""
        file = self._file(path, scheme.name)
        if not file.is_file():
            return None
        try:
            return RoundedScheme(name=scheme.name, file=file).layer(weight, bias=bias, name=path)
        except InputError:
            return None

    def filed(
        self, path: str, scheme: LinearScheme, twin: Any, weight: Tensor, bias: Tensor | None = None
    ) -> Any:
        """A new layer, now in a file's pages; as it is where it has no form on disk, or the disk is full."""
        try:
            self.keep(path, scheme, twin, weight)
        except (InputError, OSError, SafetensorError):
            return twin
        return self.found(path, scheme, weight, bias) or twin

    def scheme(self, path: str, scheme: LinearScheme) -> LinearScheme:
        """What makes a layer of this scheme: the file where it was kept, else the scheme itself."""
        if not needs_moments(scheme):
            return scheme
        return RoundedScheme(name=scheme.name, file=self._file(path, scheme.name))

    def keep_only(self, chosen: Iterable[tuple[str, str]]) -> None:
        """Remove all but these (path, scheme's name); the folder too where nothing is left."""
        wanted = {self._file(path, name) for path, name in chosen}
        if not self.folder.is_dir():
            return
        for file in self.folder.iterdir():
            if file.name == _PARTIAL or (file.suffix == ".safetensors" and file not in wanted):
                file.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _file(self, path: str, name: str) -> Path:
        digest = hashlib.sha256(f"{path} {name}".encode()).hexdigest()[:24]
        return self.folder / f"{digest}.safetensors"

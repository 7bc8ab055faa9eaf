"""Which package reads a path: transformers its folders and GGUF files, other packages what they register.

A package makes its own models known by an entry point of the group ``stabilitylab.models``,

    [project.entry-points."stabilitylab.models"]
    mine = "mine.opening:open_mine"

a function ``open_mine(path: Path, dtype: torch.dtype) -> TextModel | None``. It returns None where the path is not its own, and
raises InputError where the path is its own but cannot be read. Only installed packages have entry points; nothing beside a model's
weights is ever run.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path

import torch

from stabilitylab.command_line import needs_extra
from stabilitylab.errors import InputError
from stabilitylab.models import hugging_face
from stabilitylab.models.text_model import TextModel
from stabilitylab.models.weight_files import refuse_almost_known

GROUP = "stabilitylab.models"


def open_text_model(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, hold: bool = False
) -> TextModel:
    """Open a model for reading text.

    Args:
        path: a HuggingFace folder, a GGUF file, or whatever an installed package registers.
        dtype: format of weights and activations.
        hold: with fp32, keep weights in the 16 bits of their file and widen them while they are multiplied (``half_storage.py``),
            where that can be done: the same numbers in about the file's memory, but ``module``'s weights are then in 16 bits.

    Raises:
        InputError: there is no model, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: give a model's folder or GGUF file")
    if hugging_face.recognises(path):
        return hugging_face.open_folder(path, dtype, hold=hold)
    known, lacking = [], ""
    for entry in entry_points(group=GROUP):
        try:
            opens = entry.load()
        except ModuleNotFoundError as error:
            lacking += f"; models of {entry.name} cannot be opened here: {needs_extra(entry.name, error)}"
            continue
        known.append(entry.name)
        model = opens(path, dtype)
        if model is not None:
            assert isinstance(model, TextModel)
            return model
    # A package that is only on the path, a clone say, registers nothing, not even its own runs of glm.
    others = (
        f", nor anything that {', '.join(sorted(known))} opens"
        if known
        else ""
        if lacking
        else ", and no package is installed that opens others (in a clone: pip install .)"
    )
    refuse_almost_known(path)
    raise InputError(
        f"{path} is neither a HuggingFace folder (config.json and safetensors) nor a GGUF file"
        f"{others}{lacking or ': give one of these'}"
    )

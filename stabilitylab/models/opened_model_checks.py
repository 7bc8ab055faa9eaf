"""Checks that an opened model is the one in its files: every weight there, of its shape, read as the number that it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stabilitylab.errors import InputError
from stabilitylab.models.description import UNREADABLE, Described, first_line, quiet
from stabilitylab.models.weight_files import FLOATS, StoredTensor


def check_reads_text(path: Path, module: Any, predicts: bool) -> None:
    """Refuses encoders of pictures or sound, and those that need them beside a text."""
    if predicts:
        return
    try:
        with quiet(), torch.no_grad():
            module(input_ids=torch.tensor([[0, 0]]))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is a {module.config.model_type}, which does not read text alone ({first_line(error)}): give an encoder or a "
            "decoder of text"
        ) from None


def mismatched(described: Described, stored: Mapping[str, StoredTensor]) -> str | None:
    """Which weight of the files has another shape than the config says, in words; None where none is found by its name."""
    try:
        with quiet(), torch.device("meta"):
            built = described.loader.from_config(described.config)
    except UNREADABLE:
        return None
    for name, parameter in built.named_parameters():
        one = stored.get(name)
        if one is not None and one.shape != tuple(parameter.shape):
            return f"{name} is {one.shape} in the files and {tuple(parameter.shape)} by its config"
    return None


def check_complete(path: Path, module: Any, notes: dict[str, Any]) -> None:
    """Refuses files that lack weights, which would be random numbers. A missing pooler is taken off: no output needs it."""
    missing = sorted(notes["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        module.pooler = None
        missing = []
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} weights, among them {missing[0]}: give the whole checkpoint"
        )


def check_floats(path: Path, module: Any, stored: Mapping[str, StoredTensor]) -> None:
    """Refuses whole or logical numbers that a loader casts to floats: they are codes, and the cast loses their meaning."""
    prefix = getattr(module, "base_model_prefix", "")
    for name, parameter in module.named_parameters():
        one = (
            stored.get(name) or stored.get(f"{prefix}.{name}") or stored.get(name.removeprefix(f"{prefix}."))
        )
        if one is not None and one.dtype not in FLOATS and parameter.is_floating_point():
            raise InputError(
                f"{path} stores {one.name} as {one.dtype}, which is not a number format of weights without a scale: give the "
                "checkpoint in bf16, or dequantize it with the library that wrote it"
            )

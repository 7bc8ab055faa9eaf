"""What a folder's config says of how its weights were quantized, where that changes what their numbers mean.

Codes with scales show by themselves how to read them (``dequantization.py``). Of what the config says beside them we refuse:

    floats, and a method     a loader with that method's library would quantize them, one without it asks for the library
    a rotation of inputs     compressed-tensors' transforms that a layer applies when it runs: its weights alone are another model
    sparse storage           compressed-tensors' bitmasks

Floats under a method whose loaders leave them as they are (``_PLAIN``: checkpoints written in 16 bits again, whose config was
forgotten) are read as floats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stabilitylab.errors import InputError

# Methods under which transformers 5.23 reads floats as they are.
_PLAIN = frozenset({"compressed-tensors", "fp8", "gguf", "mxfp4", "mxfp8"})
_FOLDED = frozenset({"weight_input", "weight_output"})  # transforms that are in the weights already


def told_quantization(folder: Path) -> dict[str, Any] | None:
    """``quantization_config`` of a folder's config, or of its text part; None where there is none.

    Raises:
        InputError: there is one of another kind than an object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    told = config.get("quantization_config") or text.get("quantization_config")
    if told and not isinstance(told, dict):
        raise InputError(
            f"{folder} has a quantization_config that is no object ({json.dumps(told)[:40]}): take it out of its config.json if "
            "the weights are plain, else give the checkpoint in bf16"
        )
    return told or None


def refuse_what_is_not_read(folder: Path, *, codes: bool) -> None:
    """Refuse weights that mean something else than their numbers.

    Args:
        folder: with a config.
        codes: whether some of its weights are codes with scales that are understood.

    Raises:
        InputError: see the head of the module.
    """
    told = told_quantization(folder)
    if told is None:
        return
    if online := _online(told.get("transform_config")):
        raise InputError(
            f"{folder} says that inputs of its layers are transformed when it runs (transform_config: {online}), which is not done "
            "here: give the checkpoint in bf16"
        )
    sparse = told.get("sparsity_config")
    layout = sparse.get("format") if isinstance(sparse, dict) else None
    if layout not in (None, "dense"):
        raise InputError(
            f"{folder} says that its weights are stored sparse ({layout!r}), which is not read here: give the checkpoint in bf16"
        )
    method = told.get("quant_method")
    if codes or (isinstance(method, str) and method in _PLAIN):
        return
    said = f"is quantized by {method!r}" if isinstance(method, str) else "is quantized, and not by what"
    raise InputError(
        f"{folder} says that it {said}, and its weights are no codes that are known here: give the checkpoint in bf16; if its "
        "weights are plain, take quantization_config out of its config.json"
    )


def _online(transforms: object) -> str | None:
    """The name of a transform that is applied to activations; None where there is none."""
    groups = transforms.get("config_groups") if isinstance(transforms, dict) else None
    for name, group in groups.items() if isinstance(groups, dict) else ():
        places = group.get("apply") if isinstance(group, dict) else None
        for place in places if isinstance(places, list) else ():
            if not isinstance(place, dict) or place.get("location") not in _FOLDED:
                return str(name)
    return None

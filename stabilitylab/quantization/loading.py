"""Open what ``stabilitylab quantize --apply`` wrote for a transformers model: built without weights, filled layer by layer."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel, hugging_face, shared_parameters
from stabilitylab.quantization.serialization import (
    WEIGHTS,
    header_of,
    holds,
    load_quantized,
)


def open_quantized(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> TextModel:
    """Open a quantized model for reading text.

    Args:
        path: folder that ``--apply`` made.
        dtype: format of activations and of what is not quantized.

    Raises:
        InputError: it is not such a folder, or cannot be read.
    """
    path = Path(path)
    header = header_of(path / WEIGHTS)
    if header is None:
        raise InputError(f"{path} is not a quantized model: stabilitylab quantize --apply writes them")
    if not hugging_face.recognises(path):
        raise InputError(f"{path} is no transformers model: open it with the program that it came from")
    # What reads a folder of transformers' knows how; only the weights come from elsewhere.
    described = hugging_face.describe(path)
    with hugging_face.quiet():
        module = described.built(dtype)
        wide = hugging_face.kept_wide(module, dtype)
        hugging_face.prepare(module)
        tokenizer = described.tokenizer()
    if getattr(module, "pooler", None) is not None and not holds(path / WEIGHTS, "pooler."):
        module.pooler = None  # the original was opened without: its files lack it and no output needs it
    load_quantized(module, path / WEIGHTS, dtype=dtype, wide=wide)
    return TextModel(
        module=module.requires_grad_(False),
        name=header["name"],
        path=path,
        fingerprint=header["fingerprint"],
        predicts=described.predicts,
        longest=hugging_face.longest(module, tokenizer),
        shared=shared_parameters(module),
        cut=hugging_face.windows(tokenizer, described.predicts),
    )

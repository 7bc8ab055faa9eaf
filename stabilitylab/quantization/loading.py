"""Opens what ``stabilitylab quantize --apply`` wrote for a transformers model: builds it without weights, fills layer by layer."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel, shared_parameters
from stabilitylab.models.description import describe, kept_wide, prepare, quiet
from stabilitylab.models.hugging_face import recognises
from stabilitylab.models.tokenization import longest, windows
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
    if not recognises(path):
        raise InputError(f"{path} is not a transformers model: open it with the program that it came from")
    # The reader of transformers' folders knows how; only the weights come from elsewhere.
    described = describe(path)
    with quiet():
        module = described.built(dtype)
        wide = kept_wide(module, dtype)
        prepare(module)
        tokenizer = described.tokenizer()
    if getattr(module, "pooler", None) is not None and not holds(path / WEIGHTS, "pooler."):
        module.pooler = None  # the original was opened without one: its files lack it and no output needs it
    load_quantized(module, path / WEIGHTS, dtype=dtype, wide=wide)
    return TextModel(
        module=module.requires_grad_(False),
        name=header["name"],
        path=path,
        fingerprint=header["fingerprint"],
        predicts=described.predicts,
        longest=longest(module, tokenizer),
        shared=shared_parameters(module),
        cut=windows(tokenizer, described.predicts),
    )

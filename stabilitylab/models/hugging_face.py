"""Models of transformers: a folder with ``config.json``, weights and tokenizer, or a GGUF file.

Nothing from the folder is executed: code that it brings along is not trusted, safetensors are read as numbers, and pickled weights
only where torch's weights-only loading takes them. Nothing is fetched. Decoders open with their language-model head, everything
else as the bare encoder, whose output is the last hidden states.

Nothing is read wrongly in silence. Codes with scales beside them become numbers first (``dequantization.py``) or are refused. A
weight inside a block that the loader did not understand is an error. A note counts what lies outside the opened model (heads,
towers, layers that predict further tokens). Fused experts are taken apart into linear layers (``fused_experts.py``).

Limits: encoder-decoder models need a second text and are refused. A GGUF file's weights are dequantized, so they lie on their
file's grid: fair for studying activations, biased for judging another quantization of the weights.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from stabilitylab.errors import InputError
from stabilitylab.models import gguf_config, gguf_file, half_storage
from stabilitylab.models.dequantization import plain_folder
from stabilitylab.models.description import Described, describe, prepare, quiet
from stabilitylab.models.ignored_contents import left_aside, other_frequencies, own_code
from stabilitylab.models.memory_check import require_room, surely_fits
from stabilitylab.models.opened_model_checks import check_complete, check_floats, check_reads_text, mismatched
from stabilitylab.models.text_model import TextModel
from stabilitylab.models.tokenization import longest, windows, words_of
from stabilitylab.models.weight_files import StoredTensor, pickled_tensors, require_weights


def recognises(path: Path) -> bool:
    """Whether a path is for transformers to read: a GGUF file, a folder with one, or a folder whose config has a model type."""
    if path.is_file():
        return path.suffix == ".gguf"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return bool(list(path.glob("*.gguf")))
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)


def open_folder(path: Path, dtype: torch.dtype, *, hold: bool = False) -> TextModel:
    """Open what ``recognises`` found.

    Args:
        path: what it found.
        dtype: format of weights and activations.
        hold: keep weights in the file's 16 bits while the model computes in fp32 (``half_storage.py``), where that can be done.

    Raises:
        InputError: transformers is missing, or cannot read the files.
    """
    folder = path if path.is_dir() and (path / "config.json").is_file() else None
    if folder and (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{path} holds an adapter (adapter_config.json), which is not applied here: merge it first (peft's merge_and_unload), "
            "or take the adapter's files away to read the model without it"
        )
    plain_or_given: contextlib.AbstractContextManager[
        tuple[Path, Mapping[str, StoredTensor], tuple[str, ...]]
    ] = plain_folder(folder) if folder else contextlib.nullcontext((path, {}, ()))
    with plain_or_given as (plain, stored, said), gguf_file.opened_once(dtype):
        described = describe(path, plain)
        # A copy in a temporary folder is gone before the model is: its pages cannot be kept.
        narrow = half_storage.format_of(stored) if hold and dtype is torch.float32 and plain == path else None
        if folder and not stored:
            require_weights(folder)
            stored = pickled_tensors(folder)
        _check_room(path, described, narrow or dtype)
        tokenizer = None
        if described.where:
            # Before anything else is there: what a file says of its words takes as much as a small model.
            with quiet():
                tokenizer = described.tokenizer()
            gguf_file.forget_words(Path(described.folder) / described.where["gguf_file"])
        with quiet():
            try:
                module, info = described.weights(narrow or dtype)
            except InputError:
                if (found := mismatched(described, stored)) is None:
                    raise
                raise InputError(
                    f"{path}: {found}: they do not belong together; give the whole, intact checkpoint"
                ) from None
            if narrow is not None:
                module = described.held(module) or described.weights(dtype)[0]
            tokenizer = tokenizer or described.tokenizer()
        check_complete(path, module, info)
        check_floats(path, module, stored)
        if described.where:
            gguf_config.mend_module(module, Path(described.folder) / described.where["gguf_file"])
        notes = (
            *said,
            *left_aside(path, module, info["unexpected_keys"], stored),
            *other_frequencies(module, stored),
            *own_code(module),
        )
    prepare(module)
    check_reads_text(path, module, described.predicts)
    return TextModel.of(
        module,
        path=path,
        predicts=described.predicts,
        longest=longest(module, tokenizer),
        cut=windows(tokenizer, described.predicts, words_of(module), path),
        notes=notes,
    )


def _check_room(path: Path, described: Described, dtype: torch.dtype) -> None:
    files = (
        [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf"), *path.glob("*.bin")]
    )
    if surely_fits(sum(file.stat().st_size for file in files), dtype):
        return
    with quiet(), torch.device("meta"):
        built = described.loader.from_config(described.config)
    require_room(path, sum(parameter.numel() for parameter in built.parameters()), dtype)

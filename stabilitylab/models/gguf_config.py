"""Sets right, or refuses, what a GGUF file says of its model and transformers leaves aside, before the weights are read.

transformers 5.23 maps a table of metadata to its config and drops the rest without a word, so that some models compute something
else than the file means:

    ARCH.attention.key_length       width of a head                 qwen3: 128 is taken
    ARCH.rope.scaling.*             positions scaled linearly       gemma3 from 4B on: none is taken
    rope_freqs.weight               a divisor for each frequency    llama 3.1 on: none is taken
    (the size of the model)         scale of attention scores       gemma2 and gemma3 27B: 1 / sqrt(hidden / heads) in llama.cpp
    tensors without a place         norms or biases of a block      left out

Source: llama.cpp, ``llama-model.cpp`` (hyperparameters by architecture) and ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from stabilitylab.errors import InputError

FREQUENCIES = "rope_freqs.weight"
# The layers of the models whose scores llama.cpp scales by the width of the model instead of that of a head.
_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}


def _open(file: Path) -> Any:
    import gguf

    # The name is the one that transformers gives too: while a file is open, one reader serves both (gguf_file.py).
    return gguf.GGUFReader(str(file))


def _told(reader: Any, key: str) -> Any:
    architecture = reader.get_field("general.architecture").contents()
    field = reader.get_field(f"{architecture}.{key}")
    return None if field is None else field.contents()


def mend_config(config: Any, file: Path) -> None:
    """Set what the file says and the config does not.

    Args:
        config: transformers', changed in place.
        file: where it is from.

    Raises:
        InputError: the file scales positions in a way that is not known here.
    """
    reader = _open(file)
    width = _told(reader, "attention.key_length")
    if isinstance(width, int) and hasattr(config, "head_dim"):
        config.head_dim = width
    kind = getattr(config, "model_type", "")
    if hasattr(config, "query_pre_attn_scalar"):
        by_width = _BY_WIDTH.get(kind) == config.num_hidden_layers
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads if by_width else config.head_dim
        )
    scaling, factor = _told(reader, "rope.scaling.type"), _told(reader, "rope.scaling.factor")
    if scaling in (None, "none") or factor in (None, 1.0) or kind == "gpt_oss":
        return
    rope = getattr(config, "rope_parameters", None)
    if scaling != "linear" or not isinstance(rope, dict):
        raise InputError(
            f"{file} scales its rotary positions ({scaling}, by {factor:g}), which transformers does not read from GGUF: give the "
            "model's safetensors"
        )
    # gemma3 has two kinds of layers; only those that see everything are scaled.
    whole = rope.get("full_attention", rope)
    whole |= {"rope_type": "linear", "factor": float(factor)}


def mend_module(module: nn.Module, file: Path) -> None:
    """Divide rotary frequencies as the file says; refuse tensors that transformers had no place for.

    Args:
        module: as it was read, changed in place.
        file: where it is from.

    Raises:
        InputError: a tensor of a block has no place in the module.
    """
    reader = _open(file)
    names = {tensor.name: tensor for tensor in reader.tensors}
    if FREQUENCIES in names:
        divisors = torch.tensor(names[FREQUENCIES].data.copy()).float()
        for part in module.modules():
            for name in ("inv_freq", "original_inv_freq"):
                held = getattr(part, name, None)
                if isinstance(held, torch.Tensor) and held.shape == divisors.shape:
                    setattr(part, name, held / divisors.to(held))
    known = _places(module)
    lost = sorted(name for name in names if name.startswith("blk.") and known and name not in known)
    layers = int(getattr(module.config, "num_hidden_layers", 0))
    # Further blocks predict further tokens; a model of this kind has none.
    lost = [name for name in lost if int(name.split(".")[1]) < layers]
    if lost:
        raise InputError(
            f"{file} holds {len(lost)} weights that transformers has no place for, among them {lost[0]}: give the model's "
            "safetensors"
        )


def _places(module: nn.Module) -> set[str]:
    """GGUF's names of a module's tensors; empty where they are renamed on reading, so that names say nothing."""
    try:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )
    except ImportError:
        return set()
    kind = str(module.config.model_type)  # type: ignore[union-attr]
    if kind not in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"):
        return set()
    processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config={})
    return set(get_gguf_hf_weights_map(module, processor))

"""Small HuggingFace models on disk, with a tokenizer of single characters, written by transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it\n" * 30


def write_tokenizer(folder: Path) -> int:
    """Returns the size of the vocabulary."""
    pytest.importorskip("transformers")
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["[UNK]", *sorted(set(TEXT) | set("ABCxyz.,"))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({letter: n for n, letter in enumerate(letters)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", model_max_length=64).save_pretrained(
        folder
    )
    return len(letters)


def write_llama(folder: Path, *, tied: bool = False, seed: int = 0, layers: int = 3) -> Path:
    """A decoder whose layers matter to its output and whose channel 5 stands out."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = write_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[5] = 20.0
    model.save_pretrained(folder)
    return folder


def write_bert(folder: Path) -> Path:
    """An encoder."""
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertModel

    vocabulary = write_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def edit_weight(folder: Path, name: str, value: float) -> None:
    """Set the first number of a weight."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})

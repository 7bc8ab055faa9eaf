"""Tiny models of transformers with random weights and a real tokenizer, saved as people save theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SENTENCES = "the cat sat on a mat and then it ran under the tree .\nthe dog was very slow , a cat quick .\n"
TEXT = 40 * SENTENCES


def tokenizer(folder: Path, *, framed: bool) -> None:
    """Whole words by number; ``framed`` puts [CLS] and [SEP] around a text, as BERT's does."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[CLS]", "[SEP]", "\n", *sorted(set(SENTENCES.split()))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n"), "isolated")]
    )
    if framed:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)


def save(module: Any, folder: Path, *, framed: bool = False) -> Path:
    """Weights, configuration and tokenizer."""
    module.save_pretrained(folder)
    tokenizer(folder, framed=framed)
    return folder


def llama(**options: Any) -> Any:
    """Four layers of width 32, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        **options,
    }
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def bert() -> Any:
    """Two layers of width 32, without a head."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=48,
    )
    return BertModel(config).eval()


def gpt2() -> Any:
    """Two layers of width 32, with Conv1D for linear layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def gemma3() -> Any:
    """Two layers of width 32, grouped queries, a scaled embedding."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        max_position_embeddings=64,
    )
    return Gemma3ForCausalLM(config).eval()

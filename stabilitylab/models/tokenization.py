"""How a model of transformers takes text: how its tokenizer cuts it, what it puts around it, and how long a window may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from stabilitylab.errors import InputError
from stabilitylab.models.text import TokenWindows

# A tokenizer without a limit of its own says 1e30.
_NO_LIMIT = 10**9


def longest(module: Any, tokenizer: Any) -> int | None:
    """The most tokens that the position embedding and the tokenizer allow."""
    limits = [limit for limit in (tokenizer.model_max_length,) if limit < _NO_LIMIT]
    positions = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        offset = 0
        for name, layer in module.named_modules():
            # RoBERTa and models like it count positions from the padding's number + 1.
            if name.endswith("position_embeddings") and isinstance(layer, nn.Embedding):
                offset = 0 if layer.padding_idx is None else layer.padding_idx + 1
        limits.append(positions - offset)
    return min(limits, default=None)


def words_of(module: Any) -> int | None:
    """Rows of the token embedding; None where there is none by that name."""
    try:
        return len(module.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError):
        return None


def windows(
    tokenizer: Any, predicts: bool, words: int | None = None, path: Path | None = None
) -> TokenWindows:
    """How this tokenizer cuts text, and what it puts around it.

    Args:
        tokenizer: of the model.
        predicts: whether the model is a decoder.
        words: how many the model has; a text with others is refused.
        path: of the model, for messages.
    """

    def encode(text: str) -> list[int]:
        # verbose=False: texts longer than the model takes are what we cut.
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if words is not None and (beyond := max(tokens, default=0)) >= words:
            raise InputError(
                f"{path}: its tokenizer gives token {beyond}, and the model has {words:,} words: they do not belong together; put "
                "the model's own tokenizer there"
            )
        return tokens

    bare = encode("a")
    framed: list[int] = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    # A decoder's window is cut out of a text: what ends a text does not belong behind it.
    after = () if predicts else tuple(framed[start + len(bare) :])
    return TokenWindows(encode=encode, before=tuple(framed[:start]), after=after, predicts=predicts)

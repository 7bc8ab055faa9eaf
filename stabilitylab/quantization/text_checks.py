"""What can be wrong with a plan's text, or with how it became tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel, Window
from stabilitylab.models.text import read_text

# Letters, digits, marks, spaces and other scripts: two tokenizers that cut all of it alike are one.
_SAMPLE = "The quick brown fox, 1984-2026: x += 3.14159; 'naïve' Größe\n\tдва слова 你好世界 مرحبا\n" * 2
_WORDS = 8000  # a vocabulary of this many holds words; smaller ones may be of characters
_BYTES = 2.5  # English and Chinese alike take 3.5 to 4.5 bytes a token with a tokenizer made for them
_APART = 1.0  # nats between two texts


def mark_of_windows(windows: Iterable[Window], beside: str = "") -> str:
    """16 hexadecimal digits of a model's inputs."""
    digest = hashlib.sha256(beside.encode())
    for window in windows:
        for name, value in sorted(window.inputs.items()):
            held = value.cpu().contiguous().numpy().tobytes() if isinstance(value, Tensor) else b""
            digest.update(name.encode() + (held or str(value).encode()))
    return digest.hexdigest()[:16]


def tokenizer_mark(model: TextModel) -> str | None:
    """A mark of how text becomes tokens; None where a short text becomes none."""
    length = 64 if model.longest is None else min(64, model.longest)
    try:
        return mark_of_windows(islice(model.windows([_SAMPLE], length), 8))
    except InputError:
        return None


def text_notes(model: TextModel, text: Path, second: float | None, third: float | None) -> list[str]:
    """What a reader should know of a text.

    Args:
        model: the one that read it.
        text: the file.
        second, third: the unchanged model's loss on those parts.
    """
    notes = []
    start = next(iter(read_text(text)), "")[:20_000]
    words = _vocabulary(model)
    length = None if model.longest is None else min(512, model.longest)
    tokens = sum(window.tokens for window in model.windows([start], length)) if words >= _WORDS else 0
    size = len(start.encode())
    if tokens and size / tokens < _BYTES:
        notes.append(
            f"the text takes {size / tokens:.1f} bytes a token, where text in a language that a tokenizer of {words:,} pieces was "
            "made for takes 3.5 to 4.5: if the model will read another language than this, measure on that"
        )
    if second is not None and third is not None and abs(third - second) > _APART:
        notes.append(
            f"the unchanged model's loss is {second:.2f} on the second text and {third:.2f} on the third: they are of different "
            "languages or kinds, and the plan was measured on only one of them"
        )
    return notes


def _vocabulary(model: TextModel) -> int:
    module: Any = model.module
    try:
        return int(module.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return 0

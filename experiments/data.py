"""The text that suites train on: the default bilingual corpus, at a size that two cores chew in a minute.

It is built with the same three commands that a user gives (``glm corpus``, ``glm tokenizer``, ``glm shards``), which do
nothing where their output stands already.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stabilitylab.errors import InputError

MAX_CHARACTERS = 12_000_000
VOCABULARY = 4096
# Pieces of so small a vocabulary settle long before the whole corpus is read.
SAMPLE = 4_000_000


def bilingual(folder: Path) -> Path:
    """Corpus, tokenizer and shards under ``folder``; returns the folder of the shards."""
    return build(folder, characters=MAX_CHARACTERS, vocabulary=VOCABULARY, sample=SAMPLE)


def build(
    folder: Path, *, characters: int, vocabulary: int, sample: int, heldout: float | None = None
) -> Path:
    """Corpus, tokenizer and shards of a size.

    Args:
        folder: where they go, side by side.
        characters: of the corpus; ``sample`` of them are what the tokenizer is trained on.
        vocabulary: pieces.
        heldout: share of the groups kept out of training; None: the default's.
    """
    corpus, tokenizer, shards = (str(folder / name) for name in ("corpus", "tokenizer", "shards"))
    _glm("corpus", "--out", corpus, "--max-characters", str(characters))
    pieces = ("--vocabulary", str(vocabulary), "--sample-characters", str(sample))
    _glm("tokenizer", "--corpus", corpus, "--out", tokenizer, *pieces)
    share = () if heldout is None else ("--heldout", str(heldout))
    _glm("shards", "--corpus", corpus, "--tokenizer", tokenizer, "--out", shards, *share)
    return folder / "shards"


def _glm(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "glm", *arguments], check=False)
    if done.returncode:
        raise InputError(f"`glm {' '.join(arguments)}` failed: see its message above")

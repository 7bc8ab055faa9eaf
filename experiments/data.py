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
    corpus, tokenizer, shards = folder / "corpus", folder / "tokenizer", folder / "shards"
    _glm("corpus", "--out", str(corpus), "--max-characters", str(MAX_CHARACTERS))
    _glm(
        "tokenizer",
        "--corpus",
        str(corpus),
        "--out",
        str(tokenizer),
        "--vocabulary",
        str(VOCABULARY),
        "--sample-characters",
        str(SAMPLE),
    )
    _glm("shards", "--corpus", str(corpus), "--tokenizer", str(tokenizer), "--out", str(shards))
    return shards


def _glm(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "glm", *arguments], check=False)
    if done.returncode:
        raise InputError(f"`glm {' '.join(arguments)}` failed: see its message above")

"""The text that suites train on: the default bilingual corpus, at a size that two cores chew in a minute.

It is built with the same three commands that a user gives (``glm corpus``, ``glm tokenizer``, ``glm shards``), which do nothing
where their output stands already, and then say nothing here either.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from glm.cli import main
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
    corpus, tokenizer, shards = (folder / name for name in ("corpus", "tokenizer", "shards"))
    _glm("corpus", "--max-characters", str(characters), out=corpus)
    pieces = ("--vocabulary", str(vocabulary), "--sample-characters", str(sample))
    _glm("tokenizer", "--corpus", str(corpus), *pieces, out=tokenizer)
    share = () if heldout is None else ("--heldout", str(heldout))
    _glm("shards", "--corpus", str(corpus), "--tokenizer", str(tokenizer), *share, out=shards)
    return shards


def _glm(*arguments: str, out: Path) -> None:
    """Run a command that makes a folder; what it says of one that it finds is told once, by the run that made it."""
    words = [*arguments, "--out", str(out)]
    if out.exists():
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
    else:  # what building takes of memory and threads goes with its process
        code = subprocess.run([sys.executable, "-m", "glm", *words], check=False).returncode
    if code:
        raise InputError(f"`glm {' '.join(words)}` failed: see its message above")

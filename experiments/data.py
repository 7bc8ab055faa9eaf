"""The suites' training text: the default bilingual corpus, at a size that two cores process in a minute.

``build`` runs the user's own three commands (``glm corpus``, ``glm tokenizer``, ``glm shards``), which do nothing where their
output exists already, and then print nothing here either.
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
# Pieces of so small a vocabulary settle long before the end of the corpus.
SAMPLE = 4_000_000


def bilingual(folder: Path) -> Path:
    """Make corpus, tokenizer and shards under ``folder``; returns the folder of the shards."""
    return build(folder, characters=MAX_CHARACTERS, vocabulary=VOCABULARY, sample=SAMPLE)


def build(
    folder: Path, *, characters: int, vocabulary: int, sample: int, heldout: float | None = None
) -> Path:
    """Make corpus, tokenizer and shards of a size.

    Args:
        folder: where they go, side by side.
        characters: of the corpus; the tokenizer trains on ``sample`` of them.
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
    """Run a command that makes a folder. Prints nothing for an existing one: the run that made it has told."""
    words = [*arguments, "--out", str(out)]
    if out.exists():
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
    else:  # the memory and threads of building go with its process
        code = subprocess.run([sys.executable, "-m", "glm", *words], check=False).returncode
    if code:
        raise InputError(f"`glm {' '.join(words)}` failed: see its message above")

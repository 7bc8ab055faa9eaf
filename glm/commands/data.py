"""``glm corpus``, ``glm tokenizer``, ``glm shards``: from text to what ``glm train`` reads.

A command whose product exists already does nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from glm.data.corpus import build_corpus
from glm.data.sharding import build_shards
from glm.data.tokenizer import train_tokenizer


def corpus(
    sources: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    *,
    out: Path,
    max_characters: int | None = None,
    tasks: tuple[Path, ...] = (),
) -> int:
    """Build a text corpus: the default bilingual one, or from your own files.

    Args:
        sources: .txt, .jsonl, .parquet files (the first two also .gz or .zst) or folders of them; none: the default corpus.
        out: folder to make.
        max_characters: stop after about this many; the default corpus takes half of them in each language.
        tasks: .jsonl files of records for multi-task training, each with a Jinja template of the same name (.jinja) beside it;
            the default corpus has tasks of its own.
    """
    made = build_corpus(sources, out, max_characters, tasks)
    print(
        f"corpus: {made.documents:,} documents, {made.characters:,} characters, {made.tasks:,} task examples: {out}"
    )
    return 0


def tokenizer(
    *, corpus: Path, out: Path, vocabulary: int = 16384, sample_characters: int = 20_000_000
) -> int:
    """Train a SentencePiece tokenizer with GLM's special tokens and byte fallback.

    Args:
        corpus: folder made by `glm corpus`.
        out: folder to make.
        vocabulary: number of pieces.
        sample_characters: train on about this many characters of the corpus.
    """
    made = train_tokenizer(corpus, out, vocabulary=vocabulary, sample_characters=sample_characters)
    print(f"tokenizer: {made.vocabulary:,} pieces: {out}")
    return 0


def shards(*, corpus: Path, tokenizer: Path, out: Path, heldout: float = 0.02, threads: int = 2) -> int:
    """Turn a corpus into memory-mapped tokens with a held-out split.

    Args:
        corpus: folder made by `glm corpus`.
        tokenizer: folder made by `glm tokenizer`.
        out: folder to make; this is what `glm train --data` takes.
        heldout: share of groups (services, books, documents) kept out of training.
        threads: threads that the tokenizer uses.
    """
    made = build_shards(corpus, tokenizer, out, heldout, threads)
    examples = {split: sum(tasks.counts.values()) for split, tasks in made.tasks.items()}
    for split, what in (("train", "to train on"), ("heldout", "held out")):
        print(
            f"shards: {made.tokens(split):,} tokens and {examples.get(split, 0):,} task examples {what}: {out}"
        )
    return 0

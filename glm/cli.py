"""The ``glm`` command. ``glm/commands`` holds its commands."""

from __future__ import annotations

from collections.abc import Sequence

from stabilitylab.command_line import run_program

COMMANDS = {
    "corpus": ("glm.commands.data", "build a text corpus: the default bilingual one, or your own files"),
    "tokenizer": ("glm.commands.data", "train a SentencePiece tokenizer on a corpus"),
    "shards": ("glm.commands.data", "turn a corpus into memory-mapped tokens with a held-out split"),
    "train": ("glm.commands.train", "train a preset, with any field overridden"),
    "replay": ("glm.train.replay", "train through an event of a run again, with one thing changed"),
    "attribute": (
        "glm.train.attribute",
        "prove what an event needs, by forks that each leave one thing out",
    ),
    "generate": ("glm.commands.inference", "fill in the blanks of a text, or continue it"),
    "evaluate": (
        "glm.commands.inference",
        "measure a trained model's held-out perplexity and zero-shot tasks",
    ),
    "export": ("glm.commands.inference", "export a trained model as safetensors, with its tokenizer"),
    "plan": ("glm.commands.planning", "estimate memory, time and failures of a model on a cluster"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_program("glm", COMMANDS, arguments)

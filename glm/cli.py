"""The ``glm`` command. Its commands live beside what they command."""

from __future__ import annotations

from collections.abc import Sequence

from stabilitylab.command_line import run_program

COMMANDS = {
    "corpus": ("glm.data.commands", "build a text corpus: the default bilingual one, or your own files"),
    "tokenizer": ("glm.data.commands", "train a SentencePiece tokenizer on a corpus"),
    "shards": ("glm.data.commands", "turn a corpus into memory-mapped tokens with a held-out split"),
    "train": ("glm.train.commands", "train a preset, any field overridden"),
    "replay": ("glm.train.replay", "an event of a run again, from before it, with one thing changed"),
    "generate": ("glm.inference.commands", "fill the blanks of a text, or continue it"),
    "evaluate": ("glm.inference.commands", "held-out perplexity and zero-shot tasks of a trained model"),
    "export": ("glm.inference.commands", "a trained model as safetensors, with its tokenizer"),
    "plan": ("glm.parallel.commands", "memory, time and failures of a model on a cluster, on paper"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_program("glm", COMMANDS, arguments)

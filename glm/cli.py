"""The ``glm`` command: corpus, tokenizer, shards, train, replay.

Commands live beside what they command and are imported when called, so that help and errors are quick.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from glm.errors import InputError
from stabilitylab.command_line import parse
from stabilitylab.errors import run_command

COMMANDS = {
    "corpus": ("glm.data.commands", "build a text corpus: the default bilingual one, or your own files"),
    "tokenizer": ("glm.data.commands", "train a SentencePiece tokenizer on a corpus"),
    "shards": ("glm.data.commands", "turn a corpus into memory-mapped tokens with a held-out split"),
    "train": ("glm.train.commands", "train a preset, any field overridden"),
    "replay": ("glm.train.replay", "an event of a run again, from before it, with one thing changed"),
    "plan": ("glm.parallel.commands", "memory, time and failures of a model on a cluster, on paper"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print("usage: glm COMMAND ...; each takes --help\n")
        print("\n".join(f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items()))
        return 0
    return run_command(lambda: _dispatch(words[0], words[1:]))


def _dispatch(name: str, rest: Sequence[str]) -> int:
    if name not in COMMANDS:
        raise InputError(f"glm has no command {name!r}: choose one of {', '.join(COMMANDS)}")
    module = importlib.import_module(COMMANDS[name][0])
    if name in ("train", "replay"):
        code: int = getattr(module, f"{name}_command")(rest)
    else:
        code = parse(getattr(module, name), rest, program=f"glm {name}")
    return code

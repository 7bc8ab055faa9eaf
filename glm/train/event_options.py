"""Which event of which run: the options that ``glm replay`` and ``glm attribute`` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from glm.errors import InputError


def event_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser that knows the run, ``--event``, ``--data`` and ``--device``; it takes no abbreviated flags."""
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False, description=description)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--event",
        type=int,
        required=True,
        help="number of the episode, as `stabilitylab spikes RUN` lists them",
    )
    parser.add_argument("--data", type=Path, help="folder made by `glm shards`, if it has moved since")
    parser.add_argument(
        "--device",
        help="cpu, cuda, ...: where forks compute (the kind of device that the run was trained on)",
    )
    parser.exit_on_error = False
    return parser


def parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str], *, all_known: bool = True
) -> tuple[argparse.Namespace, list[str]]:
    """The parsed words, and the unknown rest where that is allowed. Raises InputError for wrong ones."""
    try:
        if all_known:
            return parser.parse_args(list(arguments)), []
        return parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"{parser.prog}: {error}") from None

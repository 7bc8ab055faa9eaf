"""``python -m experiments``: finds the command; help and errors do not load what runs need."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence

from experiments.program import program
from stabilitylab.errors import InputError, run_command

# Name -> its arguments, what it does, and where its function is.
COMMANDS = {
    "run": (
        "SUITE",
        "compute the missing runs; --until-decided adds seeds until its claims are decided",
        "commands.suites:run",
    ),
    "report": ("SUITE", "write its verdicts, curves and runs as one HTML page", "commands.suites:report"),
    "verdicts": ("[SUITE ...]", "show the verdicts of one, some or all suites", "commands.suites:verdicts"),
    "survival": ("STUDY", "show how long the runs of each arm survive", "commands.survival:show_survival"),
    "judge": (
        "TABLE.csv",
        "compare your own runs, one per row: is one group better, or was it the seed?",
        "commands.judge_table:judge",
    ),
    "list": ("", "list the suites and studies", "commands.catalog:list_suites"),
}


def usage() -> str:
    """The commands, one per line."""
    rows = [f"  {f'{name} {operand}':22}{summary}" for name, (operand, summary, _) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {program()} COMMAND ...; each takes --help",
            "",
            *rows,
            "",
            "SUITE, STUDY: a name from the list, or your own Python file.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)

    def command() -> int:
        if not words or words[0] in ("-h", "--help"):
            print(usage())
            return 0
        if words[0] not in COMMANDS:
            raise InputError(f"{program()} has no command {words[0]!r}: choose one of {', '.join(COMMANDS)}")
        from stabilitylab.command_line import leave_at_interrupt, needs_extra, parse

        module, _, function = COMMANDS[words[0]][2].partition(":")
        try:
            with leave_at_interrupt() if arguments is None else contextlib.nullcontext():
                form = getattr(importlib.import_module(f"experiments.{module}"), function)
        except ModuleNotFoundError as error:
            raise needs_extra(program(), error) from None
        code: int = parse(form, words[1:], program=f"{program()} {words[0]}")
        return code

    return run_command(command)

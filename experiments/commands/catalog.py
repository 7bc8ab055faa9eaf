"""Lists the suites with their questions, read from their sources: running a suite's file would load what its runs need."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

from experiments.suites import SUITES


def list_suites() -> int:
    """Name every suite and its question."""
    for name, module in SUITES.items():
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        print(f"{name}: {question_in(Path(spec.origin).read_text(encoding='utf-8'))}")
    return 0


def question_in(source: str) -> str:
    """The question of the ``SUITE`` or ``STUDY`` of a file, where it is a string.

    Raises:
        LookupError: the file has no such string.
    """
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="SUITE" | "STUDY")], value=ast.Call(keywords=keywords)):
                for keyword in keywords:
                    if keyword.arg == "question" and isinstance(keyword.value, ast.Constant):
                        return str(keyword.value.value)
    raise LookupError("no SUITE or STUDY with its question as a string")

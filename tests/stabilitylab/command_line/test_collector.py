"""In a command's own process the garbage collector leaves imports alone; in other processes the command does not touch it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stabilitylab.command_line import run_program

COMMANDS = {"look": ("looks_at_the_collector", "")}
# One cycle made while importing and one afterwards: the collector no longer knows the first one.
MODULE = """
import gc

WHILE_IMPORTED = gc.isenabled()
LISTED = [[]]


def look_command(words):
    made_later = [[]]
    known = {id(one) for one in gc.get_objects()}
    print(WHILE_IMPORTED, gc.isenabled(), id(LISTED) in known, id(made_later) in known)
    return 0
"""
PROGRAM = f"from stabilitylab.command_line import run_program; raise SystemExit(run_program('p', {COMMANDS!r}, None))"


def test_what_a_command_imports_is_walked_through_by_no_collection(tmp_path: Path) -> None:
    (tmp_path / "looks_at_the_collector.py").write_text(MODULE)
    places = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "look"],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "True", "False", "True"]


def test_the_collector_of_a_process_that_calls_a_command_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "looks_at_the_collector.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "looks_at_the_collector", raising=False)
    frozen = gc.get_freeze_count()
    assert run_program("p", COMMANDS, ["look"]) == 0
    assert capsys.readouterr().out.split() == ["True", "True", "True", "True"]
    assert gc.get_freeze_count() == frozen

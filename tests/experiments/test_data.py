"""Suites make their text once; where it exists they start nothing and say nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from experiments.data import _glm
from stabilitylab.errors import InputError


def test_text_that_stands_is_found_without_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text, corpus = tmp_path / "text", tmp_path / "corpus"
    text.mkdir()
    (text / "notes.txt").write_text("A document of a few words.\n\nAnother one of more words than that.")
    _glm("corpus", str(text), out=corpus)
    assert str(corpus) in capfd.readouterr().out
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    _glm("corpus", str(text), out=corpus)
    assert capfd.readouterr().out == ""
    with pytest.raises(InputError, match="failed: see its message above"):
        _glm("corpus", str(text), "--max-characters", "10", out=corpus)
    assert "made from other inputs or settings" in capfd.readouterr().err

"""The demo breaks its model, finds it at its step, names the cause and writes the page, without a network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from stabilitylab import demo
from stabilitylab.cli import main
from stabilitylab.runs import load_run


def test_the_demo_finds_names_and_shows_what_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(*_: object) -> None:
        raise AssertionError("the demo went to the network")

    monkeypatch.setattr(socket.socket, "connect", nobody)
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    said = capsys.readouterr().out
    assert "First suspect: the learning rate." in said
    assert f"report: {Path('stabilitylab-demo') / 'report.html'}" in said
    run = load_run(tmp_path / "stabilitylab-demo")
    onsets = [event.step for event in run.events if event.kind == "diagnosis"]
    assert onsets
    assert demo.BREAKS <= onsets[0] <= demo.BREAKS + demo.LASTS
    assert (tmp_path / "stabilitylab-demo" / "report.html").stat().st_size > 100_000
    assert demo._free(Path("stabilitylab-demo")) == Path("stabilitylab-demo-2")

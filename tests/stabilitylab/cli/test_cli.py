"""The command as users start it: a process, its output, its exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stabilitylab.cli import COMMANDS, main
from stabilitylab.report import Page
from stabilitylab.report.terminal import event_lines
from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks import ParquetSink
from stabilitylab.telemetry import Event, Key, Samples
from tests.patience import PATIENCE
from tests.stabilitylab import story
from tests.stabilitylab.test_telemetry import as_nobody


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return story.make_run(tmp_path_factory.mktemp("runs") / "[red]läuft")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a wrong command says."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_the_module_is_the_console_script() -> None:
    """Help comes at once: it imports neither torch nor matplotlib."""
    script = (
        "import sys, runpy\nsys.argv = ['stabilitylab', '--help']\n"
        "try:\n    runpy.run_module('stabilitylab', run_name='__main__')\n"
        "except SystemExit as error:\n    assert not error.code\n"
        "assert not {'torch', 'matplotlib', 'pandas', 'tensorboard'} & set(sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    assert all(name in out.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([name, "--help"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 0
    assert f"stabilitylab {name}" in capsys.readouterr().out


def test_report(run_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_path)]) == 0
    assert capsys.readouterr().out.strip() == str(run_path / "report.html")
    assert main(["report", str(run_path), "--out", str(tmp_path / "x.html")]) == 0
    # Charts number their parts on, from the first one that this process has made.
    pages = [
        re.sub(r"\bp\d+\b", "p", page.read_text()) for page in (tmp_path / "x.html", run_path / "report.html")
    ]
    assert pages[0] == pages[1]


def test_compare(run_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = story.make_run(tmp_path / "zwei", seed=1, steps=30)
    assert main(["compare", str(run_path), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert "zwei" in (tmp_path / "both.html").read_text()
    capsys.readouterr()
    assert "two run folders or more, got 1" in refusal(
        capsys, "compare", run_path, "--out", tmp_path / "one.html"
    )


def test_show(run_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["show", str(run_path)]) == 0
    said = capsys.readouterr().out
    first, cause, *_ = said.splitlines()
    assert "spike" in first
    assert "The loss went from" in first
    assert "First suspect: " in cause
    assert "Try: " in said
    assert said.index("First suspect: ") < said.index("that began at step") < said.index("━━")
    assert "[red]läuft" in said
    assert "train/-/loss" in said
    (norm,) = [line for line in said.splitlines() if "gradient_norm" in line and "120" in line]
    assert norm.split("│")[-2].strip() == "1"  # the one infinite norm is counted, not dropped
    assert f"that began at step {story.SPIKE} is over" in said
    assert "{" not in said
    assert "'" not in said.replace("embedding's", "")


def test_events_are_told_as_sentences() -> None:
    reason = {"kind": "spike", "onset": 30, "signal": "train/-/loss", "used": 1}
    events = [
        *(
            Event(step=i, kind="overflow", data={"site": "layers.3", "tensor": "activation"})
            for i in (4, 5, 9)
        ),
        Event(step=6, kind="overflow", data={"site": "layers.0", "tensor": "gradient"}),
        Event(step=24, kind="rewind", data={"why": "the responder went back", "to": 28}),
        Event(step=29, kind="spike", data={"phase": "end", "onset": 26, "end": 28, "to_the_end": False}),
        Event(step=39, kind="spike", data={"phase": "end", "onset": 36, "end": 39, "to_the_end": True}),
        Event(
            step=34,
            kind="response",
            data={
                "kind": "lower-rate",
                "rate_factor": 0.5,
                "back_to": 24,
                "skip_batches": 1,
                "reason": reason,
            },
        ),
    ]
    assert event_lines(events) == [
        "step 4: overflow: the activation of layers.3 left the number format, and 2 times more until step 9",
        "step 6: overflow: the gradient of layers.0 left the number format",
        "step 24: training went on from here: the responder went back",
        "step 29: spike that began at step 26 is over, its last step 28",
        "step 39: spike that began at step 36 was not over when the run ended",
        "step 34: the responder answered the spike of train/-/loss since step 30: back to step 24, learning rate x 0.5, "
        "1 batch left out",
    ]


def test_show_in_a_pipe_cuts_no_name(tmp_path: Path) -> None:
    key = Key("train", "-", "a_value_with_a_name_that_is_longer_than_a_terminal_is_wide_" * 2)
    sink = ParquetSink(tmp_path / "telemetry")
    sink.write(Samples.of([(0, key, 1.0)]), [])
    sink.close()
    data = {"torch": "2.13", "parallel": {"data": 2, "tensor": 1}, "changed": ["a", "b"], "nothing": None}
    RunFolder(tmp_path).append_events([Event(step=3, kind="run-start", data=data)])
    command = [sys.executable, "-m", "stabilitylab", "show", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    said = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=PATIENCE, env=environment
    ).stdout
    assert key.metric in said
    assert "step 3: run start: torch 2.13, parallel data 2, parallel tensor 1, changed a and b\n" in said


def test_wrong_paths(tmp_path: Path, run_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such directory" in refusal(capsys, "report", tmp_path / "none")
    assert "neither a run folder nor" in refusal(capsys, "show", tmp_path)
    assert "there is no folder" in refusal(capsys, "report", run_path, "--out", tmp_path / "none" / "x.html")
    assert "has no command 'reprot'" in refusal(capsys, "reprot", run_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Page, "html", lambda self: "")  # what it would hold does not matter here
        assert "Is a directory" in refusal(capsys, "report", run_path, "--out", tmp_path)


def test_a_damaged_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = story.make_run(tmp_path / "run", steps=20)
    (part,) = (run / "telemetry").glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-100])
    assert part.name in refusal(capsys, "report", run)


def test_events_with_a_cut_last_line(tmp_path: Path) -> None:
    run = story.make_run(tmp_path / "run", steps=20)
    content = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(content[:-20])
    assert main(["report", str(run)]) == 0


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    run = story.make_run(tmp_path / "run", steps=20)
    for folder in (run, tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    run.chmod(0o555)
    said = as_nobody(
        f"page.write(RunFolder({str(run)!r}).report)",
        before="from stabilitylab.report import Page\npage = Page(title='t')\npage.html()",
    )
    assert "Permission denied; choose another place" in said

"""Names, samples, events and the run folder, with what a kill or a full disk can leave of them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabilitylab.errors import InputError
from stabilitylab.runs.folder import RunFolder
from stabilitylab.telemetry import Event, Key, Samples
from tests.patience import PATIENCE

WORD = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1)
SITE = st.text(st.characters(exclude_categories=["Cs"]))  # empty where the model itself is meant


@given(WORD, SITE, WORD)
def test_a_metric_is_read_back_as_its_key(family: str, site: str, statistic: str) -> None:
    key = Key(family, site, statistic, 3)
    assert Key.parse(key.metric, 3) == key


@pytest.mark.parametrize("metric", ["", "loss", "train/loss", "/-/loss", "//", "train//", "train/-/"])
def test_what_is_no_metric(metric: str) -> None:
    with pytest.raises(InputError, match="family/site/statistic"):
        Key.parse(metric)


def test_samples_are_the_rows_they_were_made_of() -> None:
    rows = [
        (0, Key("train", "-", "loss"), 1.5),
        (0, Key("a", "b", "c", 2), math.inf),
        (7, Key("train", "-", "loss"), -0.0),
    ]
    samples = Samples.of(rows)
    assert list(samples) == rows
    assert len(samples) == 3
    assert len(Samples.of([])) == 0


def test_an_event_is_strict_json() -> None:
    data = {
        "nan": math.nan,
        "inf": np.float32(-np.inf),
        "array": np.array([[1, 2]]),
        "path": Path("a/b"),
        "häßlich \u2028": {1: (2, "</script>")},
        "truth": np.bool_(True),
    }
    line = Event(step=3, kind="spike", data=data, time=1.0).to_json()
    assert "\n" not in line
    read = Event.from_json(line)
    assert (read.step, read.kind, read.time) == (3, "spike", 1.0)
    assert read.data == {
        "nan": "nan",
        "inf": "-inf",
        "array": [[1, 2]],
        "path": "a/b",
        "häßlich \u2028": {"1": [2, "</script>"]},
        "truth": True,
    }


def kinds(run: RunFolder) -> list[tuple[int, str]]:
    return [(event.step, event.kind) for event in run.read_events()]


def test_a_rewind_drops_what_it_supersedes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    story = [
        (0, "run-start"),
        (3, "spike"),
        (5, "spike"),
        (5, "response"),
        (4, "rewind"),
        (4, "spike"),
        (9, "checkpoint"),
    ]
    run.append_events([Event(step=step, kind=kind) for step, kind in story])
    assert kinds(run) == [
        (0, "run-start"),
        (3, "spike"),
        (5, "response"),
        (4, "rewind"),
        (4, "spike"),
        (9, "checkpoint"),
    ]


@pytest.mark.parametrize("cut", [1, 10, -1])
def test_a_last_line_cut_short(tmp_path: Path, cut: int) -> None:
    """Readers ignore it; the next writer does not glue its first event to it; a whole one without its end stays."""
    run = RunFolder(tmp_path)
    run.append_events([Event(step=1, kind="spike"), Event(step=2, kind="é" * 5)])
    whole = run.events.read_bytes()
    first = whole.index(b"\n") + 1
    run.events.write_bytes(whole[:-1] if cut == -1 else whole[: first + cut])
    survivors = [(1, "spike"), (2, "é" * 5)] if cut == -1 else [(1, "spike")]
    assert kinds(run) == survivors
    run.claim()
    run.append_events([Event(step=3, kind="run-end")])
    run.release()
    assert kinds(run) == [*survivors, (3, "run-end")]
    assert run.events.read_bytes().endswith(b"\n")


def test_a_line_cut_inside_a_character(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_events([Event(step=1, kind="é")])
    content = run.events.read_bytes()
    run.events.write_bytes(content + content[: content.index("é".encode()) + 1])
    run.claim()
    run.append_events([Event(step=2, kind="b")])
    run.release()
    assert kinds(run) == [(1, "é"), (2, "b")]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.events.write_text('{"step": 1\n' + Event(step=1, kind="a").to_json() + "\n")
    with pytest.raises(InputError, match="line 1 is not an event"):
        run.read_events()


def test_a_full_disk_leaves_no_half_event(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk."""
    script = f"""
import resource
from stabilitylab.runs.folder import RunFolder
from stabilitylab.telemetry import Event
run = RunFolder({str(tmp_path)!r})
run.append_events([Event(step=1, kind="first")])
size = run.events.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
try:
    run.append_events([Event(step=2, kind="second")])
except OSError as error:
    print(error.filename)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run.append_events([Event(step=3, kind="third")])
"""
    out = subprocess.run(
        [sys.executable, "-c", script],
        preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert out.stdout.strip() == str(tmp_path / "events.jsonl")
    assert kinds(RunFolder(tmp_path)) == [(1, "first"), (3, "third")]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.claim()
    with pytest.raises(InputError, match="being written by another run"):
        RunFolder(tmp_path / "run").claim()
    first.release()
    first.claim()
    first.release()


@pytest.mark.parametrize("child_gives_back", [False, True])
def test_the_right_ends_with_its_owner_and_not_with_the_owners_children(
    tmp_path: Path, child_gives_back: bool
) -> None:
    """A child forked meanwhile (a data loader's worker) lives on, and neither holds the right nor can give it back."""
    run = RunFolder(tmp_path / "run")
    run.claim()
    go_on, tell = os.pipe()
    child = os.fork()
    if child == 0:
        if child_gives_back:
            run.release()
        os.close(tell)
        os.read(go_on, 1)
        os._exit(0)
    try:
        with pytest.raises(InputError, match="being written by another run"):
            RunFolder(tmp_path / "run").claim()
        run.release()
        second = RunFolder(tmp_path / "run")
        second.claim()
        second.release()
    finally:
        os.close(go_on)
        os.close(tell)
        os.waitpid(child, 0)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "/proc/none/run"])
def test_a_path_that_cannot_be_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="choose another folder") as error:
        RunFolder(tmp_path / name).claim()
    assert "\n" not in str(error.value)
    assert "\0" not in str(error.value)
    assert len(str(error.value)) < 300


def as_nobody(action: str, before: str = "") -> str:
    """The message of an action tried by a user without rights; the tests themselves may run as root.

    ``before`` runs with the rights of the tests: imports, which that user may not be able to read.
    """
    script = f"""
import os, warnings
from stabilitylab.errors import InputError
from stabilitylab.runs.folder import RunFolder
{before}
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    {action}
except InputError as error:
    print(error)
"""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=PATIENCE
    ).stdout


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    assert "permission denied; choose another folder" in as_nobody(
        f"RunFolder({str(locked / 'run')!r}).claim()"
    )
    assert "permission denied" in as_nobody(f"RunFolder({str(locked)!r}).claim()")


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such directory"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(InputError, match="neither telemetry/ nor events"):
        RunFolder.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file is in the way"):
        RunFolder(tmp_path / "file").claim()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

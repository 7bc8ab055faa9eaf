"""What a command says when the machine refuses: one line that names the file, code 2, and nothing half-written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from stabilitylab.cli import main
from stabilitylab.command_line.whole_file import whole_file
from stabilitylab.errors import InputError, run_command
from tests.patience import PATIENCE
from tests.stabilitylab import story

LONG = "x" * 300


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return story.make_run(tmp_path_factory.mktemp("runs") / "run", steps=20)


def fails(number: int, name: str | None = None) -> None:
    raise OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
    "number", [errno.EROFS, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST]
)
def test_a_refused_path_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(partial(fails, number, "there/file")) == 2
    assert (
        capsys.readouterr().err == f"error: cannot use there/file: {os.strerror(number)}; give another path\n"
    )


def test_any_other_error_of_the_system_keeps_its_traceback() -> None:
    for number, name in ((errno.EIO, "file"), (errno.EPERM, None), (errno.ENOENT, "file")):
        with pytest.raises(OSError, match=os.strerror(number)):
            run_command(partial(fails, number, name))


@pytest.mark.parametrize(
    "words",
    [
        ("report", "RUN", "--out", "FOLDER"),
        ("report", "RUN", "--out", LONG),
        ("compare", "RUN", "RUN", "--out", "FOLDER"),
        ("export", "RUN", "--csv", "--out", "FOLDER"),
        ("export", "RUN", "--csv", "--out", LONG),
        ("export", "RUN", "--parquet", "--out", LONG),
        ("export", "RUN", "--tensorboard", "--out", "FILE"),
        ("spikes", "RUN", "--plot", LONG + ".png"),
        ("spikes", LONG),
        ("show", LONG),
        ("inspect", LONG),
    ],
)
def test_a_place_that_cannot_serve(
    words: tuple[str, ...],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.write_text("kept")
    places = {"RUN": run, "FOLDER": folder, "FILE": file}
    given = [str(places.get(word, word)) for word in words]
    assert main(given) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert given[-1] in said
    assert sorted(tmp_path.iterdir()) == [file, folder]
    assert file.read_text() == "kept"


def test_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_text("old")

    def write(number: int | None) -> None:
        with whole_file(path) as file:
            file.write_text("half")
            if number is None:
                raise KeyboardInterrupt
            fails(number)

    with pytest.raises(OSError, match="No space left") as caught:
        write(errno.ENOSPC)
    assert caught.value.filename == str(path)
    with pytest.raises(InputError, match="page: Read-only file system; choose another place"):
        write(errno.EROFS)
    with pytest.raises(KeyboardInterrupt):
        write(None)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_what_is_read_is_not_blamed_on_what_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="part-000001"), whole_file(tmp_path / "page"):
        (tmp_path / "part-000001").read_bytes()


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    with whole_file(link) as file:
        file.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    os.mkfifo(pipe)
    with whole_file(pipe) as file:
        assert file == pipe
    assert pipe.is_fifo()


# ------------------------------------------------------------------------------- the output's reader


def started(words: list[str], out: int) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-m", "stabilitylab", *words],
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize(
    "words", [["--help"], ["show", "--help"], ["show", "RUN"], ["inspect", "RUN"]], ids=" ".join
)
def test_nobody_reads_the_output(words: list[str], run: Path) -> None:
    """Rich's consoles, plain prints and the parser's help alike end in silence, as under ``| head``."""
    reading, writing = os.pipe()
    os.close(reading)
    ended = started([str(run) if word == "RUN" else word for word in words], writing)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_no_space_for_the_output(run: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ended = started(["inspect", str(run)], full.fileno())
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: No space left on device while writing the output: free some space and run the same command again\n"
    )


def test_a_refusal_stays_one_where_nobody_reads(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = started(["show", str(tmp_path / "none")], writing)
    os.close(writing)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")


def test_an_interrupt_that_an_import_would_swallow(tmp_path: Path) -> None:
    (tmp_path / "swallowing.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)\n"
        "except BaseException:\n    pass\n"
        "def work() -> None:\n    print('half imported')\n"
    )
    program = (
        "import signal, sys\nfrom stabilitylab.command_line import run_program\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nsys.argv = ['program', 'work']\n"
        "sys.exit(run_program('program', {'work': ('swallowing', '')}, None))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")

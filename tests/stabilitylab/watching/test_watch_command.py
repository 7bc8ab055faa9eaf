"""The command as users and schedulers run it: exit codes, kills, hooks, a terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from stabilitylab.cli import main
from stabilitylab.watching import commands
from stabilitylab.watching.alerts import Alert
from tests.patience import PATIENCE, wait_until
from tests.stabilitylab.watching.growing import losses, megatron
from tests.stabilitylab.watching.test_notifiers import Server


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A log with a spike at 600 and a NaN at 800."""
    monkeypatch.chdir(tmp_path)
    curve = losses(900, spike=600)
    lines = [megatron(k, None if k == 800 else x) for k, x in enumerate(curve)]
    (tmp_path / "train.log").write_text("".join(lines))
    return tmp_path / "train.log"


@pytest.mark.parametrize(
    ("fail_on", "code"),
    [("spike", 3), ("divergence", 0), ("divergence|non-finite", 3), ("spike,divergence", 3), ("frozen", 0)],
)
def test_exit_codes(broken, capsys, fail_on, code):
    command = ["watch", str(broken), "--once", "--state", "state", "--fail-on", fail_on]
    assert main(command) == code
    out = capsys.readouterr().out
    assert out.count(": spike: ") == out.count(": non-finite: ") == 1
    # A check that is repeated says nothing again, and stays red.
    assert main(command) == code
    assert capsys.readouterr().out == ""


def test_wrong_options_are_one_line(broken, capsys):
    for words, said in (
        (["--fail-on", "spikes"], "there is no rule 'spikes'"),
        (["--webhook", "hooks.slack.com/SECRET"], "begins with https://"),
        (["--exec", "no-such-program"], "there is no such program"),
        (["--every", "0"], "give seconds above 0"),
        (["--loss", "perplexity"], "has no column 'perplexity'"),
    ):
        assert main(["watch", str(broken), "--once", "--state", "state", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error
        assert "SECRET" not in error
    assert main(["watch", "nowhere.log", "--once", "--state", "other"]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_new_only_learns_and_does_not_tell(broken, capsys):
    assert main(["watch", str(broken), "--once", "--state", "state", "--new-only", "--fail-on", "spike"]) == 0
    assert capsys.readouterr().out == ""


def start(path, *words, **options):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "stabilitylab",
            "watch",
            str(path),
            "--every",
            "0.05",
            "--state",
            "state",
            *words,
        ],
        cwd=path.parent,
        text=True,
        **options,
    )


def line_of(process, seconds=PATIENCE):
    line = b""
    while not line.endswith(b"\n"):  # byte by byte: what a buffer had read ahead, select would wait for
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        assert ready, "nothing was said"
        line += os.read(process.stdout.fileno(), 1)
    return line.decode()


def test_a_killed_watch_goes_on_and_repeats_nothing(tmp_path):
    log = tmp_path / "train.log"
    lines = [megatron(k, x) for k, x in enumerate(losses(1200, spike=600))]
    hook = Server(0, 200)  # does not answer the first time
    try:
        log.write_text("".join(lines[:700]))
        first = start(log, "--webhook", hook.url, stdout=subprocess.PIPE)
        said = [line_of(first), line_of(first)]
        wait_until(lambda: hook.taken)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        first.stdout.close()
        assert [": spike: " in said[0], ": over: " in said[1]] == [True, True]
        with log.open("a") as opened:
            opened.write("".join(lines[700:]) + megatron(1200, None))
        second = start(log, "--webhook", hook.url, "--fail-on", "non-finite", stdout=subprocess.PIPE)
        out, _ = second.communicate(timeout=PATIENCE)
    finally:
        hook.stop()
    assert second.returncode == 3
    assert [line.partition("step ")[2].partition(": lm")[0] for line in out.splitlines()] == [
        "1200: non-finite"
    ]
    told = [body["attachments"][0]["fields"][0]["value"] for _, _, body in hook.taken]
    assert told == ["spike", "spike", "non-finite"]  # the spike's was not answered, and is posted again
    assert "SECRET" not in "".join(file.read_text() for file in (tmp_path / "state").iterdir())


def test_one_state_is_one_watch_and_sigterm_ends_it(tmp_path, capsys):
    log = tmp_path / "train.log"
    log.write_text("".join(megatron(k, x) for k, x in enumerate(losses(700, spike=600))))
    process = start(log, stdout=subprocess.PIPE)
    assert ": spike: " in line_of(process)
    assert main(["watch", str(log), "--once", "--state", str(tmp_path / "state")]) == 2
    assert "another watch" in capsys.readouterr().err
    process.terminate()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    other = tmp_path / "other.log"
    other.write_text(log.read_text())
    assert main(["watch", str(other), "--once", "--state", str(tmp_path / "state")]) == 2
    assert "is the state of a watch of" in capsys.readouterr().err
    assert json.loads((tmp_path / "state" / "state.json").read_text())["values"] == 700


def test_a_terminal_shows_a_panel(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("".join(megatron(k, x) for k, x in enumerate(losses(700, spike=600))))
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = start(log, stdout=slave, stderr=slave, stdin=slave, env=environment)
    os.close(slave)
    seen = b""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and not (b"steady" in seen and b"last value" in seen):
        if select.select([master], [], [], 0.1)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:  # the last who held the other end has closed it
                break
    assert process.poll() is None, seen.decode()
    process.send_signal(signal.SIGINT)
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        if select.select([master], [], [], 0.1)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:
                break
    process.wait(timeout=PATIENCE)
    os.close(master)
    text = seen.decode()
    assert process.returncode == 0
    for words in ("lm loss", "grad norm", "steady", "level 2.", "last value", "spike: lm loss has risen"):
        assert words in text, words


@pytest.mark.parametrize("is_terminal", [True, False])
def test_one_look_that_finds_nothing_says_so_to_a_person(tmp_path, monkeypatch, capsys, is_terminal):
    log, calm = tmp_path / "train.log", tmp_path / "calm.log"
    log.write_text("".join(megatron(k, x) for k, x in enumerate(losses(700, spike=600))))
    calm.write_text("".join(megatron(k, x) for k, x in enumerate(losses(700))))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    said = []
    for path in (log, log, calm):
        assert main(["watch", str(path), "--once", "--state", str(tmp_path / path.stem)]) == 0
        said.append(capsys.readouterr())
    assert ": spike: lm loss has risen" in said[0].out
    assert [one.out for one in said[1:]] == ["", ""]
    nothing = [f"{path}: nothing new up to step 699\n" if is_terminal else "" for path in (log, calm)]
    assert [one.err for one in said] == ["", *nothing]


def test_standard_input_is_watched_until_it_ends(broken):
    text = broken.read_text()
    command = [sys.executable, "-m", "stabilitylab", "watch", "-", "--plain", "--every", "0.1"]
    with subprocess.Popen(
        [*command, "--fail-on", "non-finite"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(text[: text.index("     700/")].encode())
        process.stdin.flush()
        assert b"spike" in process.stdout.readline()  # while the pipe is open
        with process.stdin:
            process.stdin.write(text[text.index("     700/") :].encode())
        assert b"non-finite" in process.stdout.read()
        assert process.wait(PATIENCE) == 3


def beginning(log, tmp_path, *, stdout, folder=None, **options):
    """The command as a process that no closed terminal ends, its errors kept."""
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    command = [sys.executable, "-m", "stabilitylab", "watch", str(log), "--every", "0.1"]
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with (tmp_path / "errors").open("wb") as errors:
        return subprocess.Popen(
            [*command, "--state", str(tmp_path / "state"), *words],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=errors,
            env=environment,
            cwd=folder,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        )


def read_until(master, words):
    seen = b""

    def shown():
        nonlocal seen
        if select.select([master], [], [], 0.05)[0]:
            seen += os.read(master, 65536)
        return words in seen

    wait_until(shown, 0.01)


@pytest.mark.parametrize("others", [True, False])
def test_a_closed_terminal_ends_a_watch_that_tells_nobody_else(tmp_path, others):
    log, told = tmp_path / "train.log", tmp_path / "told"
    log.write_text("".join(megatron(k, x) for k, x in enumerate(losses(400))))
    master, slave = pty.openpty()
    hooks = {"exec": f"touch {told}"} if others else {}
    process = beginning(log, tmp_path, stdout=slave, **hooks)
    os.close(slave)
    read_until(master, b"steady")
    os.close(master)
    with log.open("a") as file:
        file.write(megatron(400, None))
    if others:
        wait_until(told.exists, 0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE) == 0
    assert (tmp_path / "errors").read_bytes() == b""


def test_a_reader_that_has_left_ends_a_quiet_watch(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("".join(megatron(k, x) for k, x in enumerate(losses(100))))
    read, write = os.pipe()
    process = beginning(log, tmp_path, stdout=write)
    os.close(write)
    wait_until((tmp_path / "state" / "alerts.jsonl").exists, 0.1)
    os.close(read)
    assert process.wait(timeout=PATIENCE) == 0
    assert (tmp_path / "errors").read_bytes() == b""


def test_the_folder_in_which_a_watch_began_may_go_away(tmp_path):
    log, folder = tmp_path / "train.log", tmp_path / "here"
    folder.mkdir()
    log.write_text("".join(megatron(k, x) for k, x in enumerate(losses(100))))
    process = beginning("../train.log", tmp_path, stdout=subprocess.PIPE, folder=folder)
    wait_until((tmp_path / "state" / "state.json").exists, 0.1)
    folder.rmdir()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert (tmp_path / "errors").read_bytes() == b""


def test_an_output_that_does_not_wait_is_made_to(monkeypatch):
    """Any process on a terminal can make it non-blocking for all: a write then fails instead of waiting."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    seen = []

    def slowly():
        time.sleep(0.5)
        with os.fdopen(read) as pipe:
            seen.append(pipe.read())

    reader = threading.Thread(target=slowly)
    reader.start()
    with os.fdopen(write, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        screen = commands._Screen(live=False)
        text = "x" * 1000
        for number in range(300):  # 300 kB, where a pipe holds 64
            screen.say(Alert(id=str(number), rule="spike", text=f"{text} {number}.", path="log"))
        assert not screen.is_gone
    reader.join(PATIENCE)
    assert all(f"x {number}.\n" in seen[0] for number in range(300))

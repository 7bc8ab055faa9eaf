"""Every command of the README and of docs/training.md does what it says, in an empty folder, on a reader's own text."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.boundaries import ROOMS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
# These serve until stopped, or take minutes; the Makefile's own targets are what CI runs, and the demo has a test of its own.
ELSEWHERE = ("make ", "tensorboard ", "stabilitylab demo")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the reader's text in it."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("reader")
    (folder / "my-text").mkdir()
    for name, text in topics.items():
        (folder / "my-text" / f"{name.replace('/', '-')}.txt").write_text(text, encoding="utf-8")
    (folder / "my-text" / "notes.txt").write_text("\n\n".join(topics.values())[:3_000], encoding="utf-8")
    return folder


def commands() -> list[str]:
    """Those of the README, then those of the page on training that the README does not have already."""
    text = "".join([*blocks("sh"), *blocks("sh", TRAINING)]).replace("\\\n", " ")
    lines = [line.partition("  #")[0].strip() for line in text.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def run(words: list[str], place: Path) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        words, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
    return done.stdout


def test_the_three_lines_then_every_command_in_order(place):
    (python,) = blocks("python")
    run([sys.executable, "-c", python], place)
    assert len(commands()) >= 20
    for command in commands():
        if not command.startswith(ELSEWHERE):
            # `python` is the one of the environment in which the package is installed.
            run([sys.executable if word == "python" else word for word in shlex.split(command)], place)
    assert (place / "runs" / "mine" / "report.html").stat().st_size > 10_000
    assert (place / "comparison.html").stat().st_size > 10_000


def test_makefile_has_the_targets(place):
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "test-slow", "check"):
        assert re.search(rf"^{target}:", makefile, re.M)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_tree_is_the_one_that_stands():
    tree = ARCHITECTURE.partition("## The rooms")[2].partition("Six files")[0]
    package = ""
    for line in tree.splitlines():
        if match := re.match(r"    (\w+)/ ", line):
            package = match[1]
            assert (ROOT / package).is_dir()
        elif match := re.match(r"      (\S+) ", line):
            assert (ROOT / package / match[1]).exists(), f"{package}/{match[1]}"


@pytest.mark.parametrize("package", ["stabilitylab", "glm", "experiments"])
def test_every_room_is_in_the_tree(package):
    lines = ARCHITECTURE.partition(f"    {package}/ ")[2].partition("\n    examples/")[0].splitlines()[1:]
    told = {match[1] for line in lines if (match := re.match(r"      (\w+)/ ", line))}
    rooms = {room for room in ROOMS[package] if (ROOT / package / room).is_dir()}
    assert rooms <= told, rooms - told

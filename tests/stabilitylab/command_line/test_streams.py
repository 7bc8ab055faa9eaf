"""A file that is a stream holds what was asked for alone; what is said about it goes to standard error."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "log.csv"
    path.write_text("step,loss\n" + "".join(f"{step},{3 - step / 100}\n" for step in range(40)))
    return path


def written(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stabilitylab", *words, "--out", "/dev/stdout"],
        capture_output=True,
        text=True,
        check=True,
    )


def test_a_table(log: Path) -> None:
    result = written("export", str(log), "--csv")
    header, *rows = csv.reader(result.stdout.splitlines())
    assert header == ["step", "family", "site", "statistic", "index", "value"]
    assert len(rows) == 40
    assert result.stderr == "/dev/stdout: 40 rows\n"


@pytest.mark.parametrize("words", [["report"], ["compare", "{}"]], ids=lambda words: words[0])
def test_a_page(log: Path, words: list[str]) -> None:
    result = written(*(word.format(log) for word in words), str(log))
    assert result.stdout.rstrip().endswith("</html>")
    assert result.stderr == "/dev/stdout\n"

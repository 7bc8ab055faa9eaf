"""The installed package: built from the sdist, tried outside the clone, without what only training needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"
# Runs a program as if the packages of the extra `glm` were not there.
WITHOUT = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"scipy", "cattrs", "sentencepiece"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-W", "ignore", "-c", BUILD.format(kind), str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the sdist holds."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    # A copy of what git knows: a build leaves folders behind, and the clone stays as it is.
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    with tarfile.open(build("sdist", source, folder)) as archive:
        # Python before 3.11.4, which Debian 12 has, knows no filter; what we have just packed needs none.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(folder / "sdist")
    (root,) = (folder / "sdist").iterdir()
    return root


@pytest.fixture(scope="module")
def installed(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the wheel that the sdist builds."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(build("wheel", unpacked, folder)) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


def test_site_packages_gets_two_names(installed: Path) -> None:
    names = {path.name.partition("-")[0] for path in installed.iterdir()}
    assert names == {"stabilitylab", "glm"}
    for package in names:
        wanted = {p for p in (ROOT / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        assert {path.suffix for path in wanted} >= {".c", ".h", ".py"}
        missing = [p for p in wanted if not (installed / p.relative_to(ROOT)).is_file()]
        assert not missing


def test_an_editable_installation_is_found_beside_a_clone(unpacked: Path, tmp_path: Path) -> None:
    """A folder named like the package, beside a script, is a package of its own to Python, unless a path leads to the real one."""
    with zipfile.ZipFile(build("editable", unpacked, tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    (file,) = (tmp_path / "site").glob("*.pth")
    assert file.read_text().strip() == str(unpacked)
    (tmp_path / "stabilitylab" / "docs").mkdir(parents=True)
    script = tmp_path / "script.py"
    script.write_text(
        f"import site\nsite.addsitedir({str(tmp_path / 'site')!r})\nimport stabilitylab; print(stabilitylab.__file__)"
    )
    # -S: whatever else is installed here does not count.
    command = [sys.executable, "-S", str(script)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.stdout.strip() == str(unpacked / "stabilitylab" / "__init__.py"), done.stderr


def test_experiments_are_run_from_inside_the_package(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-m", "stabilitylab", "experiments", "list")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("demo:")


def test_the_instrument_needs_nothing_of_training(installed: Path, tmp_path: Path) -> None:
    program = tmp_path / "without.py"
    program.write_text(WITHOUT)
    rows = "\n".join(f"{step},{3 - 0.01 * step + 0.02 * (step * 7919 % 13 - 6)}" for step in range(60))
    (tmp_path / "log.csv").write_text(f"step,loss\n{rows}\n")
    done = run(installed, tmp_path, str(program), "stabilitylab", "spikes", "log.csv")
    assert done.returncode == 0, done.stderr
    assert "60 loss values" in done.stdout
    for words in (("glm", "train", "glm-tiny"), ("stabilitylab", "experiments", "verdicts")):
        done = run(installed, tmp_path, str(program), *words)
        assert done.returncode == 2
        assert done.stderr.strip().endswith("pip install 'stabilitylab[glm]'")
        assert len(done.stderr.strip().splitlines()) == 1


def test_versions_are_told_alike() -> None:
    """The project's own version, and the oldest torch allowed, which `make test-oldest` tries."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (name.partition(">=")[2] for name in project["dependencies"] if name.startswith("torch>"))
    for name, pattern in {
        "Makefile": r"^OLDEST_TORCH := torch==(\S+)$",
        "CONTRIBUTING.md": r"with\s+torch\s+(\S+),\s+and\s+with\s+the\s+newest",
        "docs/attach.md": r"torch\s+(\S+),\s+the\s+oldest\s+allowed",
        "stabilitylab/compat.py": r"torch\s+(\S+),\s+the\s+oldest\s+supported",
    }.items():
        assert re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE) == [torch], name
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{project['version']}] - " in (ROOT / "CHANGELOG.md").read_text()

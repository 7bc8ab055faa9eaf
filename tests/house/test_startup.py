"""What a command loads before it does anything: only commands that need slow modules load them."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

TORCH, COMPILER = "torch", "torch._dynamo"
# Seventy files of telemetry, merged.
COMPACTION = """
import tempfile
from stabilitylab.sinks import ParquetSink
from stabilitylab.telemetry import Key, Samples
with tempfile.TemporaryDirectory() as folder:
    sink = ParquetSink(folder, rows_per_file=1)
    for step in range(70):
        sink.write(Samples.of([(step, Key("train", "-", "loss"), 1.0)]), [])
    sink.close()
"""


@pytest.mark.parametrize(
    ("program", "without"),
    [
        ("import stabilitylab.cli, glm.cli", {TORCH, "pandas", "numpy"}),
        ("import stabilitylab.logs.commands, stabilitylab.spikes.commands", {TORCH, "matplotlib"}),
        ("import stabilitylab.watching.commands, stabilitylab.watching.watch", {TORCH, "pandas"}),
        ("import stabilitylab.report.log_page, stabilitylab.report.terminal", {TORCH, "matplotlib", "scipy"}),
        # The compiler takes as long as the rest of torch, SciPy's functions alone a tenth of a short run.
        ("import stabilitylab.monitoring.monitor", {COMPILER, "scipy", "matplotlib"}),
        ("import glm.commands.train", {COMPILER, "scipy", "pandas", "matplotlib", "tensorboard"}),
        (
            "from glm.cli import main\nmain(['plan', 'glm-10b', '--gpus', '8xA100-40G', '--batch', '64'])",
            {TORCH, "pandas"},
        ),
        (
            "import stabilitylab.outliers.commands, stabilitylab.outliers.record, stabilitylab.outliers.terminal",
            {"pandas", "matplotlib"},
        ),
        (COMPACTION, {TORCH, "pandas"}),
        (
            "from experiments.cli import main\nmain(['list'])",
            {TORCH, "numpy", "scipy", "pandas", "matplotlib"},
        ),
    ],
    ids=["help", "spikes", "watch", "report", "monitor", "train", "plan", "outliers", "compaction", "list"],
)
def test_what_is_loaded(program: str, without: set[str]) -> None:
    asked = f"{program}\nimport sys\nprint('loaded:', *({without!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize("name", ["stabilitylab", "glm"])
def test_a_front_door(name: str) -> None:
    """What ``dir`` lists can be had, type checkers know the same names, and the page of Python's names has them."""
    door = importlib.import_module(name)
    assert dir(door) == sorted(door.__all__)
    assert {*door._PUBLIC, "__version__"} == set(door.__all__)
    for public in door.__all__:
        assert getattr(door, public) is not None
    source = Path(door.__file__ or "")
    told = {alias.asname for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ImportFrom)
            for alias in node.names if alias.asname}  # fmt: skip
    assert told | {"__version__"} == set(door.__all__)
    page = (source.parents[1] / "docs" / "api.md").read_text()
    for public in set(door.__all__) - {"__version__"}:
        assert f"{getattr(door, public).__module__}.{getattr(door, public).__qualname__}\n" in page, public
    with pytest.raises(AttributeError, match="has no attribute 'Moniter'"):
        door.Moniter  # noqa: B018

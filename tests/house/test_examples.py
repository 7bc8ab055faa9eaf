"""Every example does what its first line says, run as a user runs it, in a folder of its own."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from stabilitylab.outliers import CRITERIA

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# For each example, words that it prints only after it has worked.
SAYS = {
    "plain_loop.py": "report.html",
    "own_probe.py": "Name",
    "own_sink.py": "non-finite",
    "diagnose_a_log.py": "divergence",
    "hf_trainer.py": "train/-/loss",
    "own_criterion.py": "fp8-range",
    "from_outliers_to_plan.py": "on the third",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def model_and_text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from tests.stabilitylab.quantization.folders import TEXT, write_llama

    folder = tmp_path_factory.mktemp("model")
    (folder / "text").write_text(TEXT)
    (folder / "model").mkdir()
    return [str(write_llama(folder / "model")), str(folder / "text")]


def test_every_example_is_tried() -> None:
    # A suite is no script: tests/experiments/test_lookup.py runs and judges it.
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, "own_suite.py"}


@pytest.mark.parametrize("name", SAYS)
def test_an_example_works(name, tmp_path, monkeypatch, capsys, request):
    if name in ("hf_trainer.py", "own_criterion.py", "from_outliers_to_plan.py"):
        pytest.importorskip("transformers")
    words = request.getfixturevalue("model_and_text") if "MODEL TEXT" in (EXAMPLES / name).read_text() else []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *words])
    criteria = list(CRITERIA)
    code = None
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    finally:
        CRITERIA[:] = criteria
    assert not code
    assert SAYS[name] in capsys.readouterr().out

"""The floors hold, and the test that says so can fail."""

from pathlib import Path

from tests.house.boundaries import violations

ROOT = Path(__file__).parents[2]


def test_arrows_run_down_only():
    assert violations(ROOT) == []


def test_a_wrong_arrow_is_found(tmp_path):
    for package, line in {
        "stabilitylab/probes": "import glm.model",
        "glm/model": "from stabilitylab import Monitor",
        "glm/data": "def f():\n    from glm.train import loop",
        "glm/train": "from glm.parallel.engine import ParallelEngine",
        "glm/attic": "",
        "stabilitylab/sinks": "from stabilitylab.report import page",
    }.items():
        folder = tmp_path / package
        folder.mkdir(parents=True)
        (folder / "bad.py").write_text(line)
    (tmp_path / "glm" / "train" / "good.py").write_text("from stabilitylab import Monitor")
    assert {line.partition(":")[0] for line in violations(tmp_path)} == {
        "stabilitylab/probes/bad.py",
        "glm/model/bad.py",
        "glm/data/bad.py",
        "glm/train/bad.py",
        "glm/attic/bad.py",
        "stabilitylab/sinks/bad.py",
    }

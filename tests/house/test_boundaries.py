"""The floors hold, and the test that says so can fail."""

import re
from pathlib import Path

import stabilitylab.compat
from tests.house.boundaries import circles, violations

ROOT = Path(__file__).parents[2]


def test_arrows_run_down_only():
    assert violations(ROOT) == []


def test_no_files_import_each_other():
    assert circles(ROOT) == []


def test_a_circle_is_found(tmp_path):
    room = tmp_path / "stabilitylab" / "logs"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text("from stabilitylab.logs.c import thing")
    (room / "a.py").write_text("def f():\n    from stabilitylab.logs.b import thing")
    (room / "b.py").write_text("from stabilitylab.logs import c")
    (room / "c.py").write_text("import stabilitylab.logs.a")
    (room / "d.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from stabilitylab.logs.e import E"
    )
    (room / "e.py").write_text("from stabilitylab.logs.d import thing")
    assert circles(tmp_path) == [[f"stabilitylab.logs.{name}" for name in "abc"]]


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


PRIVATE = re.compile(r"\b(?:torch|aten|mkldnn)(?:\.[A-Za-z]\w*)*\.(_[A-Za-z]\w*)")


def private_names(text: str) -> set[str]:
    """Names of torch that begin with an underscore."""
    return set(PRIVATE.findall(text))


def test_private_interfaces_of_torch_are_told_in_one_place():
    told = private_names(stabilitylab.compat.__doc__)
    assert "_C" in told
    for floor in ("stabilitylab", "glm"):
        for file in sorted((ROOT / floor).rglob("*.py")):
            if file.name != "compat.py":
                used = private_names(file.read_text(encoding="utf-8"))
                families = {re.sub(r"^_foreach_\w+", "_foreach_", name) for name in used}
                assert families <= told - {"_C", "_dynamo", "_python_dispatch"}, file


def test_a_private_interface_is_found():
    assert private_names("x = torch._C._foo(1); torch.ops.aten._bar(y)\nfrom torch.utils._baz import Z") == {
        "_C",
        "_bar",
        "_baz",
    }

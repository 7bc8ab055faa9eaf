"""The floors hold, and the test that says so can fail."""

import re
from pathlib import Path

import stabilitylab.compat
from tests.house.boundaries import circles, foreign, violations

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
        "experiments/execution": "from experiments.report import page",
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
        "experiments/execution/bad.py",
    }


# Attributes with a leading underscore of other libraries' objects, which is where these come from.
OF_OTHERS = {
    "deepspeed": (
        "_INSTRUCTION_MAP", "_compute_loss", "_exec_backward_pass", "_exec_schedule", "_get_param_partition_rank", "_hp_mapping",
        "_index_in_param_group", "_set_bounds", "_topo", "_z3_optimizer",
    ),
    "transformers": (
        "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_keys_to_ignore_on_load_unexpected", "_model_mapping",
    ),
    "matplotlib": ("_get_font",),
    "numpy": ("_mmap",),
    "python": ("_fields", "_getframe"),
    "rich": ("_environ",),
}  # fmt: skip


def test_private_interfaces_of_torch_are_told_in_one_place() -> None:
    """The tables of ``compat`` have every private name of torch used elsewhere, and no unused one."""
    told = set(re.findall(r"\b_[A-Za-z]\w*", str(stabilitylab.compat.__doc__)))
    assert {"_C", "_version", "_int_mm"} <= told
    others = {name for names in OF_OTHERS.values() for name in names}
    used = {re.sub(r"^_foreach_\w+", "_foreach_", name): where for name, where in foreign(ROOT).items()}
    assert {name: used[name] for name in used.keys() - told - others} == {}
    only_in_compat = {
        "_C",
        "_current_graph_task_id",
        "_dynamo",
        "_functorch",
        "_initialize",
        "_python_dispatch",
    }
    assert {
        name for name in only_in_compat & used.keys() if used[name] != ["stabilitylab/compat.py"]
    } == set()
    assert others - used.keys() == set()


def test_a_private_interface_is_found(tmp_path: Path) -> None:
    (tmp_path / "glm").mkdir()
    (tmp_path / "glm" / "a.py").write_text(
        "import torch\nfrom torch.utils._baz import Z\nfrom torch import _qux\nclass A:\n    _own: int = 0\n"
        "    def _mine(self):\n        self._kept = self._own\n        return self._inherited\n"
        "x = torch._C._foo(1); torch.ops.aten._bar(y, y._kept, y.__dict__); getattr(y, '_named', None)\n"
    )
    assert foreign(tmp_path) == {
        name: ["glm/a.py"] for name in ("_C", "_foo", "_bar", "_baz", "_qux", "_inherited", "_named")
    }

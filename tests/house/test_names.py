"""No name stands for two things, and the test that says so can fail."""

from pathlib import Path

import pytest

from tests.house.names import CLASS_ROLES, MODULE_ROLES, faults, names

ROOT = Path(__file__).parents[2]


def test_no_name_stands_for_two_things() -> None:
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (
            {"stabilitylab/probes/plan.py": "", "glm/planning/plan.py": ""},
            "module plan: stabilitylab/probes/plan.py, glm/",
        ),
        (
            {"stabilitylab/a.py": "class Plan: ...", "experiments/b.py": "class Plan: ..."},
            "class Plan: stabilitylab/a.py, exp",
        ),
        (
            {"glm/a.py": "class Plan: ...", "glm/b.py": "Plan = dict[str, str]"},
            "class Plan: glm/a.py, glm/b.py",
        ),
    ],
    ids=["modules", "classes", "a class and a type"],
)
def test_a_name_of_two_things_is_found(tmp_path: Path, files: dict[str, str], told: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (found,) = [fault for fault in faults(tmp_path) if "is no role" not in fault]
    assert found.startswith(told)


def test_names_of_scripts_and_a_modules_own_are_free(tmp_path: Path) -> None:
    for name in ("stabilitylab/a.py", "experiments/suites/a.py", "experiments/benchmarks/_a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("class Plan: ...\nclass _Own: ...\nA = dict[str, str]\n")
    assert [fault for fault in faults(tmp_path) if "is no role" not in fault] == []


def test_a_role_that_stands_once_is_none(tmp_path: Path) -> None:
    assert len(faults(tmp_path)) == len(MODULE_ROLES) + len(CLASS_ROLES)


def test_the_census_sees_the_floors() -> None:
    modules, classes, _ = names(ROOT)
    assert {"monitor", "transformer", "arm"} <= modules.keys()
    assert {"Monitor", "Transformer", "Suite"} <= classes.keys()

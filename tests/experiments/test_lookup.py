"""The command line of experiments: suites by name and the user's own, seeds added until decided, and refusals."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.arm import Arm, Suite
from experiments.cli import main
from experiments.commands.catalog import question_in
from experiments.execution import runner
from experiments.execution.sequential import MOST_SEEDS, first_seeds, run_adding, seconds, with_found
from experiments.lookup import checked, load
from experiments.suites import SUITES
from experiments.verdicts import Claim, judge_all
from stabilitylab.errors import InputError
from tests.experiments.test_runner import Here
from tests.glm.conftest import data_folder, text_files  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own-suite.md"
EXAMPLE = ROOT / "examples" / "own_suite.py"
SMALL = ("model.layers", "1"), ("model.hidden", "16"), ("model.heads", "2"), ("batch.rows", "2")


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The page's file, which is the example's, on a smaller model."""
    (shown,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    text = EXAMPLE.read_text(encoding="utf-8")
    assert text.endswith(f'"""\n\n{shown}')
    small = "".join(f'"{flag}": "{value}", ' for flag, value in SMALL)
    file = tmp_path / "gated.py"
    file.write_text(text.replace('settings={"monitor.every"', f'settings={{{small}"monitor.every"'))
    return file


def test_the_pages_suite_runs_and_is_judged(
    example: Path,
    data_folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "chosen", lambda *_: (lambda: Here([0]), 1))
    words = ["run", str(example), "--data", str(data_folder), "--steps", "2", "--seeds", "1"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "GeGLU" in said.out
    assert "undecided" in said.out
    assert {path.name for path in (tmp_path / "runs" / "gated").iterdir() if path.is_dir()} == {
        f"{arm}-seed0" for arm in ("gelu", "geglu")
    }
    assert main(["verdicts", str(example), "--json"]) == 0
    body = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (body["suite"], body["verdict"], body["n"]) == ("gated", "undecided", 1)
    assert {"effect", "interval", "e_value", "detectable_effect"} <= body.keys()
    assert main(["report", str(example)]) == 0
    assert (tmp_path / "runs" / "gated" / "report.html").is_file()


SUITE = Suite(
    name="made",
    question="?",
    preset="glm-tiny",
    steps=1,
    seeds=(5, 7),
    arms=(Arm(name="a", summary=""), Arm(name="b", summary="")),
    claims=(Claim(text="less", metric="final_loss", arm="a", baseline="b"),),
    data=lambda folder: folder,
)


def looked(effect: float, **how: object) -> tuple[list[tuple[int, ...]], Suite]:
    """The seeds that each call asked for, where the arms differ by ``effect``."""
    asked: list[tuple[int, ...]] = []

    class Loss:
        scale, margin, worst = "linear", None, None

    def judge(suite: Suite) -> object:
        noise = {seed: 0.1 * np.random.default_rng(seed).normal() for seed in suite.seeds}
        values = {"a": {s: 1.0 - effect + x for s, x in noise.items()}, "b": dict.fromkeys(noise, 1.0)}
        return judge_all(suite.claims, {"final_loss": values}, {"final_loss": Loss()})

    made = run_adding(SUITE, lambda part: asked.append(part.seeds), judge, **how)
    return asked, made


def test_seeds_are_added_until_the_claims_are_decided() -> None:
    asked, made = looked(1.0, until_decided=True)
    assert asked[0] == (5, 7, 8, 9)
    assert asked == [made.seeds[:n] for n in range(4, len(made.seeds) + 1)]
    assert len(made.seeds) < 8
    asked, made = looked(0.0, until_decided=True)
    assert len(made.seeds) == MOST_SEEDS
    # As many seeds at a time as fill the places.
    asked, _ = looked(0.0, until_decided=True, seeds=10, places=6)
    assert list(map(len, asked)) == [4, 7, 10]


def test_without_a_question_all_seeds_come_at_once() -> None:
    assert looked(1.0)[0] == [(5, 7)]
    assert looked(1.0, seeds=4)[0] == [(5, 7, 8, 9)]
    assert first_seeds((3, 1), 1) == (3,)


def test_a_budget_begins_no_new_seed(capsys: pytest.CaptureFixture[str]) -> None:
    asked, made = looked(0.0, until_decided=True, budget=1e-9)
    assert asked == [(5,)] == [made.seeds]
    assert "spent after 1 of 16 seeds: a verdict needs 4" in capsys.readouterr().err
    # Long enough: seed by seed, and no verdict is asked for before there can be one.
    asked, made = looked(1.0, until_decided=True, budget=1e9)
    assert asked == [made.seeds[:n] for n in range(1, len(made.seeds) + 1)]
    assert 4 <= len(made.seeds) < 8


def test_seeds_beyond_the_planned_ones_are_found(tmp_path: Path) -> None:
    for name in ("a-seed5", "a-seed12", "b-rate0.25-seed9", "notes"):
        (tmp_path / name).mkdir()
    assert with_found(SUITE, tmp_path).seeds == (5, 7, 9, 12)
    assert with_found(SUITE, tmp_path / "none").seeds == (5, 7)


@pytest.mark.parametrize(("text", "meant"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_budgets_are_spoken(text: str, meant: float) -> None:
    assert seconds(text) == meant


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("run", "quack"), "there is no suite 'quack': choose one of"),
        (("run", "none.py"), "none.py is no file"),
        (("run", "quick", "--budget", "soon"), "a budget of 'soon': give seconds"),
        (("run", "quick", "--budget", "0"), "a budget of '0'"),
        (("run", "quick", "--seeds", "0"), "--seeds must be at least 1, got 0"),
        (("run", "quick", "--steps", "-3"), "--steps must be at least 1"),
        (("run", "depth-init", "--steps", "2"), "is a study, of its own length"),
        (("run", "depth-init", "--seeds", "0"), "--seeds must be at least 1"),
        (("verdicts", "--runs", "nowhere"), "nowhere holds no runs of a suite"),
        (("verdicts", "quick", "--runs", "nowhere"), "no complete run of quick"),
        (("verdicts", "quack"), "there is no suite 'quack'"),
        (("say",), "has no command 'say': choose one of run"),
    ],
)
def test_bad_words_are_one_line(
    words: tuple[str, ...],
    error: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert error in said.err


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("SUIT = 1", "holds no SUITE"),
        ("SUITE = {'arms': 3}", "holds no SUITE"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_file_that_is_no_suite_is_one_line(
    text: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert main(["run", str(file)]) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert error in said.err


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ('arm="geglu"', "is of the arm 'glu', which is none of gelu, geglu"),
        ('baseline="gelu"', "is of the arm 'glu'"),
        ('metric="final_loss"', "is of the metric 'glu', which is none of"),
        ('Arm(name="gelu"', "has the arm 'geglu' twice"),
        ('source="2002.05202"', "has the direction 'glu': give less or more"),
    ],
)
def test_claims_are_checked_before_anything_runs(example: Path, change: str, error: str) -> None:
    text = example.read_text()
    into = {
        'Arm(name="gelu"': 'Arm(name="geglu"',
        'source="2002.05202"': 'direction="glu"',
    }.get(change, re.sub(r'"\w+"', '"glu"', change))
    assert change in text
    example.write_text(text.replace(change, into, 1))
    with pytest.raises(InputError, match=re.escape(error)):
        load(str(example))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"seeds": ()}, "has no seeds"),
        ({"steps": 0}, "has 0 steps"),
        ({"name": "../mine"}, "the name '../mine'"),
        ({"arms": (Arm(name="a/b", summary=""),), "claims": ()}, "the arm 'a/b'"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(
    example: Path, change: dict[str, object], error: str
) -> None:
    suite = load(str(example))
    assert isinstance(suite, Suite)
    with pytest.raises(InputError, match=re.escape(error)):
        checked(dataclasses.replace(suite, **change), "mine.py")  # type: ignore[arg-type]


def test_a_file_in_the_place_of_the_runs_is_one_line(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    assert main(["run", str(example), "--out", str(tmp_path / "taken"), "--data", str(tmp_path)]) == 2
    assert "taken cannot be made a folder (File exists)" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer_is_told_of_before_text_is_made(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask itself looks for ten seconds."""

    def nobody(address: str) -> None:
        raise InputError(f"no Dask scheduler answers at {address}")

    monkeypatch.setattr("experiments.execution.executors.Dask", nobody)
    monkeypatch.setattr("experiments.data.build", lambda *_, **__: pytest.fail("text was made"))
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(example), "--executor", "dask:127.0.0.1:9"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.splitlines()) == ("", ["error: no Dask scheduler answers at 127.0.0.1:9"])


def test_a_suite_without_runs_is_left_out_of_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quick").mkdir()
    (tmp_path / "lead").mkdir()
    line = {"arm": "pre", "seed": 1, "seconds": 1.0, "values": {"advance_4x": 0.5}}
    (tmp_path / "lead" / "values.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["verdicts", "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "left out" in said.err
    assert "lead" in said.out


def test_a_file_may_hold_a_study_and_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "my_question.py").write_text("QUESTION = 'Is it?'\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\nfrom my_question import QUESTION\nfrom experiments.suites.depth_init import STUDY as THEIRS\n"
        "STUDY = dataclasses.replace(THEIRS, name='mine', question=QUESTION)\n"
    )
    assert (load(str(file)).name, load(str(file)).question) == ("mine", "Is it?")


def test_every_name_of_the_list_is_checked() -> None:
    assert all(dataclasses.is_dataclass(load(name)) for name in SUITES)


def test_the_list_tells_every_suites_question(capsys: pytest.CaptureFixture[str]) -> None:
    """It reads them from the source; the suites themselves say the same."""
    assert main(["list"]) == 0
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert told == {name: load(name).question for name in SUITES}


def test_a_question_that_is_computed_is_not_told() -> None:
    assert question_in("SUITE = Suite(name='a', question='Is ' 'it?')") == "Is it?"
    with pytest.raises(LookupError):
        question_in("SUITE = Suite(name='a', question=asked())")

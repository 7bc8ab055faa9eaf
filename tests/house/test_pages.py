"""What the pages tell the reader to type works: whole examples run, and every command and flag that a page names exists."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import glm.cli
import stabilitylab.cli
from stabilitylab import load_run
from stabilitylab.models import open_text_model
from stabilitylab.outliers import CRITERIA
from stabilitylab.quantization.export_forms import REGISTERED
from stabilitylab.quantization.plan import load_plan

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
PROGRAMS = {"stabilitylab": stabilitylab.cli, "glm": glm.cli}
# Up to the end of the line or of the code span; a line that ends in a backslash goes on.
NAMED = re.compile(r"\b(stabilitylab|glm) ([a-z]+)\b((?:[^`\n\\]|\\\n?)*)")
FLAG = re.compile(r"(?<![\w-])--[a-z](?:[\w.-]*\w)?")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def python_of(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page(name), re.S)


def named() -> dict[tuple[str, str], set[str]]:
    """(program, command) -> the flags that some page gives it."""
    found = defaultdict(set)
    for text in (file.read_text(encoding="utf-8") for file in PAGES):
        for program, command, rest in NAMED.findall(text):
            if command != "import":
                found[program, command] |= set(FLAG.findall(rest.partition("  #")[0].partition(" | ")[0]))
    return found


@pytest.mark.parametrize("place", sorted(named()), ids=" ".join)
def test_commands_and_flags_that_pages_name_exist(place, capsys):
    program, command = place
    cli = PROGRAMS[program]
    assert command in cli.COMMANDS
    words = {"train": ["glm-tiny", "--help", "all"], "experiments": ["run", "--help"]}.get(
        command, ["--help"]
    )
    with contextlib.suppress(SystemExit):
        cli.main([command, *words])
    told = capsys.readouterr().out
    missing = {flag for flag in named()[place] if not re.search(re.escape(flag) + r"(?![\w-])", told)}
    assert not missing, missing


def test_flags_of_the_tables_of_techniques_and_terms_exist(capsys):
    """A cell holds flags, whole or behind the prefix in the column's head, and values of the flag before."""
    with contextlib.suppress(SystemExit):
        glm.cli.main(["train", "glm-tiny", "--help", "all"])
    known, named, prefix = set(FLAG.findall(capsys.readouterr().out)), set(), ""
    for line in page("techniques.md").splitlines():
        cell = line.split("|")[2] if line.count("|") > 2 else ""
        if found := re.search(r"flag(?: \(`(--[a-z-]+\.)`)?", cell):
            prefix = found[1] or ""
        elif prefix and cell:
            named |= {prefix + word for word in re.findall(r"`([a-z_]+(?:\.[a-z_*]+)+)", cell)}
        named |= set(re.findall(r"--[a-z][\w.*-]*", cell)) - {prefix}
    named |= set(re.findall(r"`(--[a-z][\w.-]*\w)", page("glossary.md")))
    assert len(named) > 40
    for name in (one.replace("_", "-") for one in named):
        assert any(flag == name or flag.startswith(name.rstrip("*")) for flag in known), name


def test_whole_examples_of_attaching_and_of_asking(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = [code for code in python_of("attach.md") if code.startswith("import torch")]
    assert len(whole) == 2
    for code in whole:
        exec(compile(code, "docs/attach.md", "exec"), {"__name__": "example"})
    assert load_run("runs/margin").series("curvature/-/margin").index.tolist() == [50, 100]
    assert stabilitylab.cli.main(["forecast", "runs/formats"]) == 0
    assert "nvfp4" in capsys.readouterr().out

    (asking,) = [code for code in python_of("tutorial.md") if "load_run" in code]
    said: dict[str, object] = {}
    lines = asking.replace("runs/plain", "runs/margin").splitlines()
    for line in lines:
        code, _, comment = line.partition("  # ")
        said[comment] = eval(code, said) if comment else exec(code, said)
    assert isinstance(said["a pandas series over steps"], pd.Series)
    table = said["sites by steps"]
    assert isinstance(table, pd.DataFrame)
    assert "0" in table.index
    assert list(table.columns) == list(range(0, 101, 10))
    assert said["what was found"] == load_run("runs/margin").events


def test_patterns_of_the_page_on_logs(tmp_path, capsys):
    (command,) = re.findall(r"--pattern '(t=.*?)'\n", page("logs.md"))
    (formats,) = re.findall(r"\n    (\[mytrainer\]\n(?:    .*\n?)+)", page("logs.md"))
    (tmp_path / "formats.toml").write_text(formats.replace("\n    ", "\n"))
    (tmp_path / "one.txt").write_text(
        "".join(f"t={k} objective {3 + k % 5} |g| {k % 3}\n" for k in range(40))
    )
    (tmp_path / "two.txt").write_text(
        "".join(f"it {k} l={3 + k % 5}\n  grad_norm={k % 3}\n" for k in range(40))
    )
    for name, pattern in (("one", command), ("two", str(tmp_path / "formats.toml"))):
        assert stabilitylab.cli.main(["inspect", str(tmp_path / f"{name}.txt"), "--pattern", pattern]) == 0
        assert "40 values, steps 0 to 39; loss (" in (said := capsys.readouterr().out)
        assert "gradient_norm (grad_norm)" in said


def test_extensions_are_written_from_the_page_alone(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from tests.stabilitylab.quantization.folders import TEXT, write_llama

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stabilitylab.outliers.criteria.CRITERIA", criteria := list(CRITERIA))
    made: dict[str, object] = {"__name__": "extensions"}
    try:
        for code in python_of("extend.md"):
            exec(compile(code, "docs/extend.md", "exec"), made)
        shares = load_run("runs/dead").matrix("dead", "share")
        assert list(shares.index) == ["1"]
        assert list(shares.columns) == list(range(0, 40, 5))
        assert ((shares >= 0) & (shares < 1)).all(axis=None)
        assert load_run("runs/number").series("train/-/temperature").tolist() == [
            1 / (1 + step) for step in range(40)
        ]
        assert made["sink"].largest > 0
        assert any(one.name == "fp8-range" for one in criteria)

        (tmp_path / "model").mkdir()
        (tmp_path / "text").write_text(TEXT)
        command = ["quantize", str(write_llama(tmp_path / "model")), "--text", "text", "--plan", "plan.json"]
        command += ["--tokens", "32", "--verify-tokens", "64", "--length", "32", "--apply", "out"]
        assert stabilitylab.cli.main([*command, "--format", "round"]) == 2
        assert "there is no --format round: give one of" in capsys.readouterr().err
        command += ["--format", "rounded"]
        assert stabilitylab.cli.main([*command, "--schemes", "nvfp4"]) == 2
        assert "it has for int4-row, int8-row" in capsys.readouterr().err
        assert stabilitylab.cli.main([*command, "--schemes", "int4-row", "int8-row"]) == 0
        plan, opened = load_plan(Path("plan.json")), open_text_model("model")
        rounded = load_file("out/rounded.safetensors")
        for path, scheme in plan.schemes.items():
            layer = opened.module.get_submodule(path)
            assert torch.equal(rounded[f"{path}.weight"], scheme.layer(layer.weight).stored.dequantize())
    finally:
        REGISTERED.clear()

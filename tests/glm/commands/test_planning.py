"""``glm plan`` on its command line."""

from __future__ import annotations

import json

import pytest

from glm.cli import main

GLM = ["plan", "glm-130b", "--gpus", "96x8xA100-40G", "--batch", "4224"]


def test_tables(capsys):
    assert main([*GLM, "--shown", "10", "--what-if"]) == 0
    said = capsys.readouterr().out
    assert "4x8x24" in said
    assert "3.8%" in said
    assert "98,304" in said
    assert max(map(len, said.splitlines())) <= 150


def test_json(capsys):
    assert main([*GLM, "--json", "--shown", "3", "--what-if"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["plans"]) == 3
    assert found["feasible"] + sum(found["rejected"].values()) == found["considered"]
    for plan in found["plans"]:
        assert plan["tensor"] * plan["pipeline"] * plan["data"] == 768
        assert sum(plan["parts"].values()) == pytest.approx(plan["seconds"])
        parts = [size for name, size in plan["memory"].items() if name != "total"]
        assert sum(parts) == pytest.approx(plan["memory"]["total"])
    assert {one["gpus"] for one in found["what_if"]} == {768, 1_024, 4_096, 16_384, 65_536, 98_304}


def test_serving(capsys):
    assert main(["plan", "glm-130b", "--gpus", "4xRTX3090", "--quantize", "int4"]) == 0
    assert "RTX3090" in capsys.readouterr().out
    assert main(["plan", "glm-130b", "--gpus", "8xRTX2080Ti", "--quantize", "int4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [plan["tensor"] for plan in found["serving"] if plan["fits"]] == [8]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["glm-131b", "--gpus", "8xA100-40G"], "there is no preset 'glm-131b'"),
        (["glm-130b", "--gpus", "8 A100"], "is not NODESxGPUSxNAME"),
        (["glm-130b", "--gpus", "8xA100"], "choose one of A100-40G, A100-80G"),
        (["glm-130b", "--gpus", "8xTPU"], "is not known"),
        (["glm-130b", "--gpus", "8xA100-40G", "--batch", "0"], "--batch must be positive"),
        (["glm-130b", "--gpus", "8xA100-40G", "--restart", "-1"], "--restart"),
        (["glm-130b", "--gpus", "8xA100-40G"], "nothing fits on 1x8xA100-40G"),
        (["glm-130b", "--gpus", "4xRTX3090", "--quantize", "fp16"], "does not fit"),
        (["glm-tiny", "--gpus", "1xA100-40G"], "--vocabulary"),
    ],
)
def test_wrong_input_is_one_line(capsys, words, said):
    assert main(["plan", *words]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert said in line

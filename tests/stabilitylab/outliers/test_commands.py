"""The command on real files: tables, JSON and pages; every wrong input is one line and exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from stabilitylab.cli import main
from stabilitylab.runs import load_run
from tests.stabilitylab.models import tiny
from tests.stabilitylab.story import make_run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("model") / "a [bold] name")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text(tiny.TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run")


def test_terminal(model, text, capsys):
    assert main(["outliers", str(model), "--text", str(text), "--tokens", "200", "--length", "20"]) == 0
    said = capsys.readouterr().out
    assert "a [bold] name: 200 tokens in 10 windows" in said
    assert all(
        word in said for word in ("llm.int8", "massive", "GLM-130B", "Worst channels", "mlp.down_proj")
    )


def test_json_is_one_object_and_nothing_else(model, text, capsys):
    assert main(["outliers", str(model), "--text", str(text), "--tokens", "100", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == 100
    assert {one["name"] for one in record["criteria"]} >= {"llm.int8", "over-6", "massive", "3x-median"}


def test_page(model, text, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["outliers", str(model), "--text", str(text), "--tokens", "200", "--html", str(out)]) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    html = out.read_text(encoding="utf-8")
    for outside in ('src="http', 'href="http', "@import", "url(http", "<link", "<script"):
        assert outside not in html
    for title in (
        "Which formats each layer tolerates",
        "How many outliers",
        "The worst channels",
        "Where they are",
        "Growth over depth",
    ):
        assert f"<h2>{title}</h2>" in html
    assert html.count("<svg role") + html.count("<img") == 5 + 4 + 1


def test_a_run_is_shown_from_telemetry_alone(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["outliers", str(run), "--json", "--html", str(out)]) == 0
    record = json.loads(capsys.readouterr().out)
    loaded = load_run(run)
    shares = loaded.matrix("activation", "outlier_fraction")
    assert record["steps"] == list(shares.columns)
    assert record["statistics"]["outlier_fraction"]["series"] == pytest.approx(
        list(shares.mean(axis=0)), rel=1e-5
    )
    largest = loaded.matrix("activation", "absmax")
    peak = record["statistics"]["absmax"]["peak"]
    assert peak["value"] == pytest.approx(largest.to_numpy().max(), rel=1e-5)
    assert largest.loc[peak["site"], peak["step"]] == largest.to_numpy().max()
    assert "Growth over training" in out.read_text(encoding="utf-8")
    assert main(["outliers", str(run)]) == 0
    assert "outlier_fraction" in capsys.readouterr().out


def wrong(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says on stderr, which must be one line."""
    try:
        code = main(["outliers", *arguments])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_wrong_texts(model, text, tmp_path, capsys):
    there = str(model)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x01")
    assert "no window of tokens" in wrong([there, "--text", str(tmp_path / "empty.txt")], capsys)
    assert "not UTF-8" in wrong([there, "--text", str(tmp_path / "bytes.txt")], capsys)
    assert "does not exist" in wrong([there, "--text", str(tmp_path / "none.txt")], capsys)
    assert "at most 64 tokens" in wrong([there, "--text", str(text), "--length", "65"], capsys)
    assert "no room for text" in wrong([there, "--text", str(text), "--length", "1"], capsys)


def test_wrong_options(model, text, tmp_path, capsys):
    there = [str(model), "--text", str(text)]
    assert "--tokens counts tokens" in wrong([*there, "--tokens", "-1"], capsys)
    assert "--length counts tokens" in wrong([*there, "--length", "0"], capsys)
    assert "there is no folder" in wrong([*there, "--html", str(tmp_path / "no" / "page.html")], capsys)
    assert "give --text FILE" in wrong([str(model)], capsys)
    assert "does not exist" in wrong([str(tmp_path / "none")], capsys)


def test_wrong_models(model, text, run, tmp_path, capsys):
    def damaged(name: str, value: torch.Tensor | None) -> str:
        out = tmp_path / f"{name}-{value is None}"
        shutil.copytree(model, out)
        tensors = load_file(out / "model.safetensors")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return str(out)

    name = "model.layers.0.mlp.up_proj.weight"
    words = ["--text", str(text)]
    assert "holds NaN" in wrong([damaged(name, torch.full((48, 32), torch.nan)), *words], capsys)
    assert "lacks 1 weights" in wrong([damaged(name, None), *words], capsys)
    pickled = tmp_path / "pickled"
    shutil.copytree(model, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "weights" in wrong([str(pickled), *words], capsys)
    assert "neither a HuggingFace folder" in wrong([str(tmp_path), *words], capsys)


def test_runs_without_activations(tmp_path, capsys):
    (tmp_path / "telemetry").mkdir()
    assert "recorded no activations" in wrong([str(tmp_path)], capsys)

"""The scan recognises planted outliers for what they are, and foretells what each remedy changes."""

import json
import re

import pytest
import torch

from stabilitylab.cli import main
from stabilitylab.formats import gaussian_error, what_if, what_if_format
from stabilitylab.outliers.bearing import FACTOR, FORMATS, Bearing, _layer
from tests.stabilitylab.quantization.folders import TEXT, write_llama


def layer(edit, *, is_text=True, weight=None):
    torch.manual_seed(0)
    x, w = torch.randn(128, 256), torch.randn(64, 256)
    edit(x)
    if weight is not None:
        weight(w)
    return _layer("up", x, w, is_text), x


def set_(x, at, value):
    x[at] = value


def test_normal_numbers_are_borne_in_every_format():
    found, x = layer(lambda x: None)
    assert not found.broken
    for name in FORMATS:
        assert 0.8 < found.plain[name] < 1.2
        exact = what_if(x, name).error / gaussian_error(what_if_format(name))
        assert found.plain[name] == pytest.approx(exact, rel=0.1)


def test_a_massive_first_token_is_told_from_a_steady_channel():
    sink, _ = layer(lambda x: set_(x, (0, 7), 400.0))
    assert sink.broken["int8-tensor"].cause == "first token"
    assert "reaches 400 at the first position (channel 7)" in sink.broken["int8-tensor"].detail
    # A scale a token confines it to that token, FP8 bears it.
    assert sink.bears("fp8-e4m3-tensor")
    steady, _ = layer(lambda x: x[:, 7].mul_(40.0))
    why = steady.broken["int8-row"]
    assert (why.cause, why.detail[:9]) == ("channels", "channel 7")
    assert steady.bears("fp8-e4m3-tensor")
    # A rotation spreads one channel over its block, smoothing moves it into the weight.
    assert steady.rotated["int8-row"] < FACTOR < steady.plain["int8-row"]
    assert steady.smoothed["int8-row"] < steady.plain["int8-row"]


def test_tokens_weights_and_what_is_spread():
    tokens, _ = layer(lambda x: set_(x, ([9, 40], 3), 400.0))
    assert tokens.broken["int8-tensor"].cause == "tokens"
    assert tokens.broken["int8-tensor"].detail == "2 of 127 tokens reach 400"
    heavy, _ = layer(lambda x: None, weight=lambda w: set_(w, (5, 1), 300.0))
    assert heavy.broken["int8-tensor"].cause == "weight"
    assert "output channel 5 reaches 300" in heavy.broken["int8-tensor"].detail
    spread, _ = layer(lambda x: x.copy_(torch.distributions.StudentT(2.0).sample(x.shape)))
    assert spread.broken["int8-tensor"].cause == "spread"
    # Of the tokens of an expert none is known to be the first.
    expert, _ = layer(lambda x: set_(x, (0, 7), 400.0), is_text=False)
    assert expert.broken["int8-tensor"].cause == "tokens"
    sentence = Bearing(layers=[tokens, heavy, spread]).sentence("int8-tensor")
    assert sentence.startswith(
        "0 of 3 layers tolerate it; 3 do not: 1 by single tokens, 1 by large values in many places, 1 by their"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


def test_the_command_tells_it(folder, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text(TEXT)
    assert (
        main(
            [
                "outliers",
                str(folder),
                "--text",
                str(text),
                "--tokens",
                "128",
                "--html",
                str(tmp_path / "p.html"),
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "fp8-e4m3-tensor: All 22 layers tolerate it as they are." in told
    page = (tmp_path / "p.html").read_text()
    assert page.index("Which formats each layer tolerates") < page.index("How many outliers")
    # The decision is the first thing that is read.
    lead = re.search(r"All 22 linear layers tolerate ([^.]*)\.", page)
    assert lead is not None
    assert "FP8 E4M3, one scale a tensor" in lead[1]
    assert "int8, one scale a tensor breaks" in lead[1]
    assert lead.start() < page.index("To run a model in 8-bit arithmetic")
    assert main(["outliers", str(folder), "--text", str(text), "--tokens", "128", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["formats"]
    assert len(rows) == 22
    assert rows[0]["formats"]["nvfp4"]["cause"] is None
    assert 0.5 < rows[0]["formats"]["nvfp4"]["error"] < 2

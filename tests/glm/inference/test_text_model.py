"""A GLM opened as stabilitylab's text model: its losses are its log-probabilities, its rows those of its objective."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from glm.errors import InputError
from glm.inference.log_probabilities import log_probabilities
from glm.inference.prompt import Prompt
from glm.inference.text_model import GlmWindows, open_glm
from stabilitylab.models import GROUP, Window
from stabilitylab.outliers import scan_outliers

TEXT = ["The cat sat on the mat. 这是一个句子。 Numbers follow: 1, 2, 3. " * 12]


def test_the_entry_point_is_declared():
    assert 'glm = "glm.inference.text_model:open_glm"' in Path("pyproject.toml").read_text()
    found = [entry for entry in entry_points(group=GROUP) if entry.name == "glm"]
    if not found:
        pytest.skip("installed before the entry point was declared: pip install -e . again")
    assert found[0].load() is open_glm


@pytest.mark.parametrize("which", ["run", "causal_run"])
def test_losses_are_the_log_probabilities_of_the_targets(which, request):
    model = open_glm(request.getfixturevalue(which), torch.float32)
    opened = request.getfixturevalue({"run": "opened", "causal_run": "opened_causal"}[which])
    assert model is not None
    assert model.predicts
    assert model.longest == 96
    window = next(model.windows(TEXT, 30))
    assert window.tokens == 30
    text = opened.tokenizer.encode(TEXT[0])[:30]
    causal = which == "causal_run"
    text, half = (text, 1) if causal else (text[:29], 14)
    mask = () if causal else (opened.tokenizer.special.gmask,)
    prompt = Prompt(
        kind="causal" if causal else "gmask",
        context=(*text[:half], *mask),
        blanks=() if causal else (half,),
        parts=("",),
        sop=opened.tokenizer.special.sop,
    )
    expected = log_probabilities(opened, [prompt], [text[half:]])[0]
    total, count = model.loss(window)
    assert count == len(text) - half
    # Float32 log-softmaxes of numbers near 7, each right to a few units in the last place.
    assert total == pytest.approx(-expected.total, abs=count * 7 * 1e-6)


@pytest.mark.parametrize("limit", [None, 4, 50, 64])
def test_windows_are_the_text_cut(opened, limit):
    cut = GlmWindows(tokenizer=opened.tokenizer, objective=opened.config.objective)
    windows: list[Window] = list(cut(iter(TEXT), 32, limit))
    special = opened.tokenizer.special
    tokens = [
        t for w in windows for t in w.inputs["tokens_BT"][0].tolist() if t not in (special.gmask, special.sop)
    ]
    targets = [w.targets_BT[w.targets_BT >= 0].tolist() for w in windows]
    # Every window's text: what it reads, and its last target, which is only predicted.
    text = opened.tokenizer.encode(TEXT[0])
    at = 0
    for window, wanted in zip(windows, targets, strict=True):
        size = window.tokens - 1
        assert wanted == text[at + size // 2 : at + size]
        at += size
    assert len(tokens) == at - len(windows)
    assert all(window.tokens == 32 for window in windows[:-1])
    read = sum(window.tokens for window in windows)
    assert read <= limit if limit is not None else at >= len(text) - 4


def test_a_checkpoint_opens_and_is_scanned(run):
    model = open_glm(sorted((run / "checkpoints").iterdir())[-1], torch.float32)
    assert model is not None
    scan = scan_outliers(model, TEXT, length=30, tokens=90)
    assert len(scan.residual_stream) == 2
    assert sorted(scan.roles()) == [
        "attention.output",
        "attention.query_key_value",
        "feed_forward.down",
        "feed_forward.up",
        "residual stream",
    ]


def test_what_is_not_ours_is_left_to_others(tmp_path, run):
    assert open_glm(tmp_path, torch.float32) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_glm(tmp_path, torch.float32) is None
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(InputError, match="has no checkpoint yet"):
        open_glm(tmp_path, torch.float32)


def test_windows_too_short_are_refused(run):
    model = open_glm(run, torch.float32)
    assert model is not None
    with pytest.raises(InputError, match="length of at least 4"):
        next(model.windows(TEXT, 3))

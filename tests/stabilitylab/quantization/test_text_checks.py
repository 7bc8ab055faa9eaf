"""Refusals of texts and tokenizers that do not fit a plan."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from stabilitylab.errors import InputError
from stabilitylab.models import memory_check, open_text_model
from stabilitylab.quantization import text_checks
from stabilitylab.quantization.text_checks import text_notes, tokenizer_mark
from tests.stabilitylab.quantization.folders import TEXT


def test_another_tokenizer_has_another_mark(llama_folder, tmp_path):
    own = open_text_model(llama_folder)
    copy = shutil.copytree(llama_folder, tmp_path / "copy")
    assert tokenizer_mark(open_text_model(copy)) == tokenizer_mark(own)
    file = copy / "tokenizer.json"
    data = json.loads(file.read_text())
    words = data["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    file.write_text(json.dumps(data))
    other = open_text_model(copy)
    assert other.fingerprint == own.fingerprint
    assert tokenizer_mark(other) != tokenizer_mark(own)


def test_a_text_of_many_tokens_gets_a_note(llama_folder, tmp_path, monkeypatch):
    model = open_text_model(llama_folder)
    file = tmp_path / "text"
    file.write_text(TEXT)
    # Characters are tokens here, and the vocabulary says so.
    assert text_notes(model, file, 2.0, 2.5) == []
    monkeypatch.setattr(text_checks, "_WORDS", 10)
    (note,) = text_notes(model, file, 2.0, 2.5)
    assert "1.0 bytes a token" in note
    assert len(text_notes(model, file, 2.0, 4.5)) == 2


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(llama_folder, monkeypatch):
    there = memory_check.available_memory()
    assert there is None or there > 0
    monkeypatch.setattr(memory_check, "available_memory", lambda: 10_000)
    with pytest.raises(InputError, match=r"GB in float32, and 0\.0 GB of memory are free"):
        open_text_model(llama_folder)
    weights = sum(p.numel() for p in open_in_plenty(llama_folder, monkeypatch).module.parameters())
    # Twice the room in half the bytes: float16 fits where float32 does not.
    monkeypatch.setattr(memory_check, "available_memory", lambda: 3 * weights)
    with pytest.raises(InputError):
        open_text_model(llama_folder)
    assert open_text_model(llama_folder, dtype=torch.float16).name


def open_in_plenty(folder, monkeypatch):
    monkeypatch.setattr(memory_check, "available_memory", lambda: 1 << 40)
    return open_text_model(folder)

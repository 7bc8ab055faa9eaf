"""One of each architecture, saved once."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.stabilitylab.models import tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny.save(tiny.llama(), folder / "llama"),
        "bert": tiny.save(tiny.bert(), folder / "bert", framed=True),
        "gpt2": tiny.save(tiny.gpt2(), folder / "gpt2"),
    }


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text(tiny.TEXT, encoding="utf-8")
    return file

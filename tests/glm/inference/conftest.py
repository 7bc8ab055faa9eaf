"""A small run of ``glm train`` on text in two languages with a user's tasks, and a tokenizer of ten tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from glm.cli import main
from glm.data.corpus import build_corpus
from glm.data.sharding import build_shards
from glm.data.special import SpecialTokens
from glm.data.tokenizer import train_tokenizer
from glm.inference.loading import open_model
from glm.presets import PRESETS

SMALL = "--model.layers 2 --model.hidden 32 --model.heads 2 --model.length 96 --batch.rows 2"
PIECES = ("--objective.pieces", "2")
QUIET = "--monitor.every 0 --monitor.gradients-every 0 --monitor.no-tensorboard --checkpoint.ring 0"
PARITY = (
    "{{ number }}是偶数吗？[MASK]。 ||| {{ '是' if number % 2 == 0 else '否' }} ||| 是\n否",
    "Is {{ number }} even? ||| {{ 'yes' if number % 2 == 0 else 'no' }} ||| yes\nno",
)


@pytest.fixture(scope="session")
def task_data(text_files, tmp_path_factory):
    """Shards with two yes-or-no tasks, one in each language, each number a group."""
    folder = tmp_path_factory.mktemp("task-data")
    records = [{"number": n, "group": f"n{n}"} for n in range(200)]
    files = []
    for name, template in zip(("parity-zh", "parity-en"), PARITY, strict=True):
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("\n".join(map(json.dumps, records)))
        files[-1].with_suffix(".jinja").write_text(template, encoding="utf-8")
    build_corpus((text_files,), folder / "corpus", None, tuple(files))
    train_tokenizer(folder / "corpus", folder / "tokenizer", vocabulary=800, sample_characters=200_000)
    build_shards(folder / "corpus", folder / "tokenizer", folder / "shards", 0.2, 1)
    return folder / "shards"


def train(data, out, preset="glm-tiny", *more):
    words = ["train", preset, "--data", str(data), "--out", str(out), *SMALL.split(), *QUIET.split()]
    words += PIECES if PRESETS[preset].objective != "causal" else ()
    assert main([*words, "--steps", "4", "--checkpoint.every", "2", *more]) == 0
    return out


@pytest.fixture(scope="session")
def run(task_data, tmp_path_factory):
    """A run of four updates."""
    return train(task_data, tmp_path_factory.mktemp("runs") / "glm")


@pytest.fixture(scope="session")
def causal_run(task_data, tmp_path_factory):
    """The same with next-token prediction and learned positions."""
    return train(task_data, tmp_path_factory.mktemp("runs") / "causal", "gpt3-like")


@pytest.fixture(scope="session")
def opened(run):
    return open_model(run)


@pytest.fixture(scope="session")
def opened_causal(causal_run):
    return open_model(causal_run)


@dataclass(frozen=True)
class FewTokens:
    """The special tokens and three more."""

    special: SpecialTokens = field(default_factory=SpecialTokens)
    vocabulary: int = 10

"""Real text for glm's tests: Python's own documentation topics, which every installation carries, and a little Chinese."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from glm.data.corpus import build_corpus
from glm.data.sharding import build_shards
from glm.data.shards import TokenData
from glm.data.tokenizer import train_tokenizer

CHINESE = (
    "大规模语言模型的训练常常因为损失尖峰而中断。梯度范数可以作为训练崩溃的信息指标，崩溃通常滞后于梯度范数尖峰几步。",
    "混合精度训练用半精度做前向和反向计算，用单精度保存主权重和优化器状态，动态损失缩放防止梯度下溢。",
    "流水线并行把模型分成几段，张量并行把每一层切开，数据并行让多份模型同时训练不同的样本。",
)


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one .jsonl of about 150 documents in two languages."""
    folder = tmp_path_factory.mktemp("text")
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
        for name, text in sorted(topics.items()):
            file.write(json.dumps({"text": text, "language": "en", "source": "pydoc", "group": name}) + "\n")
        for number in range(60):
            text = "".join(CHINESE[(number + i) % 3] for i in range(6))
            file.write(
                json.dumps({"text": text, "language": "zh", "group": f"zh{number}"}, ensure_ascii=False)
                + "\n"
            )
    return folder


@pytest.fixture(scope="session")
def data_folder(text_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of that text with a tokenizer of 1,000 pieces."""
    folder = tmp_path_factory.mktemp("data")
    build_corpus((text_files,), folder / "corpus", None)
    train_tokenizer(folder / "corpus", folder / "tokenizer", vocabulary=1000, sample_characters=300_000)
    build_shards(folder / "corpus", folder / "tokenizer", folder / "shards", 0.1, 1)
    return folder / "shards"


@pytest.fixture(scope="session")
def data(data_folder: Path) -> TokenData:
    """The same, opened."""
    from glm.data.shards import open_data

    return open_data(data_folder)

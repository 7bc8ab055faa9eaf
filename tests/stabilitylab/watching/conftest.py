"""A log that grows, and watches that end with the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stabilitylab.watching import growing


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while growing.OPEN:
        growing.OPEN.pop().end()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "train.log"

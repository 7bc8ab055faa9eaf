"""A probe that fails is reported and left out in a user's run; in ours it is a failure."""

import pytest


@pytest.fixture(autouse=True)
def strict_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STABILITYLAB_STRICT", "1")

"""In a user's run the monitor reports and drops a probe that fails; in tests such a probe is a failure."""

import pytest


@pytest.fixture(autouse=True)
def strict_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STABILITYLAB_STRICT", "1")

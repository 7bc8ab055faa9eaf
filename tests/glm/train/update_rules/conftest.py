"""What all tests of update rules share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def products_in_fp32(monkeypatch):
    """Newton-Schulz runs in bf16 where a machine has units for it; tests compare formulas in fp32 on every machine."""
    monkeypatch.setattr("glm.train.update_rules.muon.multiplies_natively", lambda dtype: False)

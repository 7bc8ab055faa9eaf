"""An integration whose trainer is not installed says in one line what to install."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "package", "requirement"),
    [
        ("transformers", "transformers", "stabilitylab[hf]"),
        ("lightning", "lightning.pytorch", "stabilitylab[hf]"),
        ("olmo_core", "olmo_core", "ai2-olmo-core"),
    ],
)
def test_what_is_missing_is_told(monkeypatch, name, package, requirement):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"stabilitylab.integrations.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError) as told:
        importlib.import_module(f"stabilitylab.integrations.{name}")
    assert str(told.value).startswith("this integration needs ")
    assert str(told.value).endswith(f": pip install '{requirement}'")

"""A run's configuration as readers show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as ``model.norm`` -> value, without values that a table cannot show."""
    pairs: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            pairs |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, (bool, int, float, str)):
            pairs[f"{prefix}{name}"] = value
    return pairs

"""What the training loop hands over at a step's end: its number, and its own values by name.

A step that is not a number is a mistake in the loop's code, which shows at the first step: an ``InputError``. A value that is not a
number may turn up in the middle of a long run, and monitoring never stops training: the monitor records NaN, and warns once per
name.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.telemetry import Key

_log = logging.getLogger("stabilitylab")


def step_number(step: Any) -> int:
    """A step as an int; accepts NumPy's integers and integer tensors of one element.

    Raises:
        InputError: ``step`` is not a whole number.
    """
    try:
        return operator.index(step)
    except (TypeError, RuntimeError):
        raise InputError(
            f"step is {' '.join(repr(step).split())[:60]}, a {type(step).__name__}: give a whole number, "
            "which counts optimizer updates from 0"
        ) from None


class Values:
    """Turns given values into numbers; remembers its warnings."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def numbers(self, given: Mapping[str, Any]) -> dict[str, float | Tensor]:
        """Name -> float, or a tensor of one element on an accelerator, which is read once it has arrived. Values of None are left
        out."""
        return {self._name(name): self._number(name, v) for name, v in given.items() if v is not None}

    def _name(self, name: str) -> str:
        if name and "/" not in name:
            return name
        try:
            Key.parse(name)
            return name
        except InputError:
            pass
        plain = name.replace("/", ".").strip(".") or "unnamed"
        self._say(name, f"the name is not family/site/statistic: recorded as {plain!r}")
        return plain

    def _number(self, name: str, value: Any) -> float | Tensor:
        try:
            if isinstance(value, Tensor):
                if value.numel() == 1 and not value.is_complex():
                    value = value.detach()
                    return float(value) if value.device.type == "cpu" else value.reshape(())
                raise ValueError(f"a tensor of shape {tuple(value.shape)}, {value.dtype}")
            if isinstance(value, np.ndarray) and value.size != 1:
                raise ValueError(f"an array of shape {value.shape}")
            if isinstance(value, (int, float, np.generic)):
                return float(value)
            if isinstance(value, np.ndarray):
                return float(value.reshape(()))
            raise ValueError(f"a {type(value).__name__}")
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            self._say(name, f"it is not a number ({error}): NaN is recorded")
            return float("nan")

    def _say(self, name: str, what: str) -> None:
        if name not in self._said:
            self._said.add(name)
            _log.warning("the value %r given to monitor.step: %s", name, what)

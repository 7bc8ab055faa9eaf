"""Hooks that stay with the model they were put on.

Users copy (``copy.deepcopy`` for an average of weights) and pickle (``torch.save(model)``) a watched model like any other. Plain
hooks would be copied too: the probes would watch the copy as if it were the model, and a nested function cannot be pickled. A
``Hook`` leaves in the copy a function of the standard library that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any


class Hook:
    """Calls ``function``; a copy of it does nothing."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # The exit of an empty context: takes anything, returns None. It exists wherever the model is loaded, also without this
        # library.
        return getattr, (nullcontext(), "__exit__")

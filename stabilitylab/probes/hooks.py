"""Hooks on modules that stay with the model they were put on.

A model that is watched is copied (``copy.deepcopy`` for an average of weights) and pickled (``torch.save(model)``) like any other.
What is registered with it would go along: the copy would be watched as if it were the model, and a function made inside another
cannot be pickled. A ``Hook`` leaves in the copy a function of the standard library that does nothing.
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
        # The way out of a context that nothing was entered with: takes anything, returns None. It is there wherever the model is
        # loaded, also where this library is not.
        return getattr, (nullcontext(), "__exit__")

"""Imports a package's names on first use (PEP 562), so that a user of one does not wait for all.

    __getattr__, __dir__ = lazy_names(__name__, __all__, _PUBLIC)

The same names stand under ``TYPE_CHECKING`` in the package, for type checkers and editors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence


def lazy_names(
    package: str, public: Sequence[str], homes: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's ``__getattr__`` and ``__dir__``.

    Args:
        package: its name.
        public: what ``dir`` lists.
        homes: name -> its module, or ``module:name`` where its name there differs.
    """

    def getattribute(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = homes[name].partition(":")
        return getattr(importlib.import_module(module), attribute or name)

    return getattribute, lambda: list(public)

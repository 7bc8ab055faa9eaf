"""Watch other people's trainers. Import a module only where its trainer is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def installed_by(requirement: str) -> Iterator[None]:
    """Make failing imports in this block say what to install.

    Args:
        requirement: in pip's form.

    Raises:
        ModuleNotFoundError: with the command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this integration needs {error.name}: pip install '{requirement}'", name=error.name
        ) from None

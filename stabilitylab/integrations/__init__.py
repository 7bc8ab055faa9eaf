"""Watch other people's trainers. Import a module only where its trainer is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def installed_by(requirement: str) -> Iterator[None]:
    """Imports in here that fail say what to install.

    Args:
        requirement: as pip takes it.

    Raises:
        ModuleNotFoundError: with the command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this integration needs {error.name}: pip install '{requirement}'", name=error.name
        ) from None

"""How this program was called, for what it says to type next: ``python -m experiments`` in a clone, ``stabilitylab experiments``
where it lies inside an installation (``stabilitylab/laboratory.py`` says so)."""

from __future__ import annotations

_name = "python -m experiments"


def program() -> str:
    """The words before a command."""
    return _name


def called_as(name: str) -> None:
    """Say how it was called."""
    global _name
    _name = name

"""How this program was called, for the commands that it suggests: ``python -m experiments`` in a clone, ``stabilitylab
experiments`` inside an installation (``stabilitylab/laboratory.py`` says so).
"""

from __future__ import annotations

_name = "python -m experiments"


def program() -> str:
    """The words before a command."""
    return _name


def called_as(name: str) -> None:
    """Set how it was called."""
    global _name
    _name = name

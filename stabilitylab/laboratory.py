"""``stabilitylab experiments ...``: the laboratory, from a clone or from an installation.

In a clone the experiments are a folder beside this package, run by ``python -m experiments``. A package of that name in
site-packages would shadow everybody else's ``experiments``. So an installation keeps the folder inside this package, where nothing
can import it by accident, and the command puts it on the path of its own process and of those that it starts.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stabilitylab.errors import InputError

_HERE = Path(__file__).resolve().parent


def experiments_command(words: Sequence[str]) -> int:
    """Run the laboratory's command line; returns its exit code.

    Raises:
        InputError: the experiments are not part of this installation.
    """
    folder = str(folder_of_experiments())
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [
            folder,
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]  # for workers, which are processes of their own
    )
    laboratory = importlib.import_module("experiments.cli")
    importlib.import_module("experiments.program").called_as("stabilitylab experiments")
    code: int = laboratory.main(list(words))
    return code


def folder_of_experiments() -> Path:
    """The folder that holds ``experiments``: inside this package, or the clone. Raises InputError where it is nowhere."""
    for folder in (_HERE / "_bundled", _HERE.parent):
        if (folder / "experiments" / "cli.py").is_file():
            return folder
    raise InputError("the experiments are not part of this installation: reinstall stabilitylab, or clone it")

"""The builder of C sources, under the name that all of glm uses (``stabilitylab.c_compiler``), and what loads them."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stabilitylab.c_compiler import SWITCH, built, switched_off

__all__ = ["INTEGER", "POINTER", "SWITCH", "built", "loaded", "switched_off"]

INTEGER, POINTER = ctypes.c_int64, ctypes.c_void_p
_FLAGS = ("-std=gnu11", "-ffp-contract=fast")
_log = logging.getLogger("glm")


def loaded(source: Path, functions: Mapping[str, Sequence[Any]]) -> ctypes.CDLL | None:
    """Compile and load a C file; None where that fails, and torch operations do the work.

    Args:
        source: the file.
        functions: types of the arguments of each function, which returns nothing.
    """
    if switched_off():
        return None
    try:
        library = ctypes.CDLL(str(built(source, _FLAGS)))
        for name, arguments in functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = tuple(arguments), None
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        _log.debug("%s is not compiled, torch operations train: %s", source.name, error)
        return None
    return library

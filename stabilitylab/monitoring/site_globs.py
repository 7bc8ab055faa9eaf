"""Globs over module and parameter paths: what the user asked for, and which globs match nothing in the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from stabilitylab.model_structure import named_modules

_log = logging.getLogger("stabilitylab")


def patterns(globs: str | Sequence[str]) -> tuple[str, ...]:
    """One glob or several, as a tuple."""
    return (globs,) if isinstance(globs, str) else tuple(globs)


def warn_of_unmatched(sites: Sequence[str], model: nn.Module, parameters: Iterable[str]) -> None:
    """Warn of the ``sites`` that match no module, no module's input and no parameter."""
    modules = [path for path, _ in named_modules(model)]
    paths = [*modules, *(f"{path}:input" for path in modules), *parameters]
    unmatched = [site for site in sites if not any(fnmatchcase(path, site) for path in paths)]
    if unmatched:
        examples = ", ".join(repr(path) for path in modules[1:4]) or "none but the model itself"
        _log.warning(
            "sites=%s matches no module or parameter of the model, whose modules are named as: %s",
            ", ".join(map(repr, unmatched)),
            examples,
        )

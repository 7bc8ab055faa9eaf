"""Finds parameters by glob, and tables whose rows a model looks up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from stabilitylab.errors import InputError
from stabilitylab.model_structure import is_embedding, named_modules

_SHOWN = 12


def groups_by_glob(globs: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Glob -> the parameters that it matches, by their own name or by that of a module around them.

    Raises:
        InputError: one matches none.
    """
    found = {}
    for glob in globs:
        hits = tuple(name for name in names if any(fnmatchcase(path, glob) for path in _paths(name)))
        if not hits:
            shown = ", ".join(
                dict.fromkeys(".".join("*" if p.isdigit() else p for p in n.split(".")) for n in names[:200])
            )
            raise InputError(f"{glob!r} matches no parameter of the model: it has {_cut(shown)}")
        found[glob] = hits
    return found


def embedding_weights(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that are tables whose rows the model looks up."""
    tables = {
        f"{path}.weight" if path else "weight"
        for path, module in named_modules(model)
        if is_embedding(module)
    }
    return tuple(name for name in names if name in tables)


def _paths(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(len(parts), 0, -1))


def _cut(said: str) -> str:
    parts = said.split(", ")
    return ", ".join(parts[:_SHOWN]) + (", ..." if len(parts) > _SHOWN else "")

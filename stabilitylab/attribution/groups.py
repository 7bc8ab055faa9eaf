"""Parameters in groups that a person has names for: each block's attention, feed-forward and norms, embedding, head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from stabilitylab.errors import InputError
from stabilitylab.model_structure import blocks, is_embedding, is_norm, named_modules

_SHOWN = 12


def groups(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Label -> parameters, in the model's order; every name is in one.

    A block's children are its groups, its norms together one; outside of blocks the outermost modules are.
    """
    paths = sorted(blocks(model), key=len, reverse=True)
    norms = {path for path, module in named_modules(model) if is_norm(module)}
    found: dict[str, list[str]] = {}
    for name in names:
        module = name.rpartition(".")[0]
        block = next((path for path in paths if module == path or module.startswith(path + ".")), None)
        if block is None:
            label = name.partition(".")[0]
        elif module == block:
            label = name
        else:
            child = module[len(block) + 1 :].partition(".")[0]
            label = (
                f"{block}'s norms" if module in norms and f"{block}.{child}" == module else f"{block}.{child}"
            )
        found.setdefault(label, []).append(name)
    return {label: tuple(members) for label, members in found.items()}


def groups_by_glob(globs: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Glob -> the parameters it matches, by their own name or by that of a module they lie in.

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
    """Those of ``names`` that are tables whose rows are looked up."""
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

"""Proof of cause by forks: which one thing, left out, keeps an event from coming."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stabilitylab.attribution.forks import Fork as Fork
    from stabilitylab.attribution.loop import Loop as Loop
    from stabilitylab.attribution.loop import LoopState as LoopState
    from stabilitylab.attribution.proof import Attribution as Attribution
    from stabilitylab.attribution.search import attribute as attribute
    from stabilitylab.attribution.without import Without as Without

# Name -> the module that has it, imported on first use: a report tells what forks proved, and must not load torch.
_PUBLIC = {
    "Attribution": "proof",
    "Fork": "forks",
    "Loop": "loop",
    "LoopState": "loop",
    "Without": "without",
    "attribute": "search",
}
__all__ = ["Attribution", "Fork", "Loop", "LoopState", "Without", "attribute"]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

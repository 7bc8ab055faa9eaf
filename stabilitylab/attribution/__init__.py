"""Prove a cause by forks: find the one thing without which an event does not come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stabilitylab.lazy_names import lazy_names

if TYPE_CHECKING:
    from stabilitylab.attribution.ablation import Without as Without
    from stabilitylab.attribution.forks import Fork as Fork
    from stabilitylab.attribution.loop import Loop as Loop
    from stabilitylab.attribution.loop import LoopState as LoopState
    from stabilitylab.attribution.proof import Attribution as Attribution
    from stabilitylab.attribution.search import attribute as attribute

# Name -> the module that has it, imported on first use: a report shows what forks proved, and must not load torch.
_PUBLIC = {
    "Attribution": "stabilitylab.attribution.proof",
    "Fork": "stabilitylab.attribution.forks",
    "Loop": "stabilitylab.attribution.loop",
    "LoopState": "stabilitylab.attribution.loop",
    "Without": "stabilitylab.attribution.ablation",
    "attribute": "stabilitylab.attribution.search",
}
__all__ = ["Attribution", "Fork", "Loop", "LoopState", "Without", "attribute"]

__getattr__, __dir__ = lazy_names(__name__, __all__, _PUBLIC)

"""Repeated forward passes, and what passes leave in a model between two updates.

A pass notes what the end of its update reads: experts note their loads, attention its heads' largest scores. A repeated pass, which
recomputes activations or tries other weights, must not count twice: ``unnoted`` takes back what it noted. ``NOTES`` names whatever
a layer remembers from pass to pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glm.model.attention import Attention
from glm.model.cache import LayerCache
from glm.model.experts import Experts
from glm.model.positions import Rotation

NOTES: dict[type[nn.Module], tuple[str, ...]] = {
    Attention: ("largest_H",),
    Experts: ("load_E", "dropped", "penalty"),
}


@contextmanager
def unnoted(model: nn.Module) -> Iterator[None]:
    """Afterwards restore what passes leave in a model."""
    noting = ((m, names) for m in model.modules() for kind, names in NOTES.items() if isinstance(m, kind))
    kept = [(module, name, getattr(module, name)) for module, names in noting for name in names]
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def recomputed(
    layer: nn.Module,
    x_BTC: Tensor,
    bias_BHTS: Tensor | None,
    turned: Rotation | None,
    cache: LayerCache | None,
    keys_B: Tensor | None,
) -> Tensor:
    """A layer's output; its backward pass computes again what it needs."""

    def passes() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), unnoted(layer)

    given = x_BTC, bias_BHTS, turned, cache, keys_B
    out: Tensor = checkpoint(layer, *given, use_reentrant=False, context_fn=passes)
    return out

"""The backward pass computes inputs of linear layers again, so that the forward pass need not keep them.

``y = W h`` keeps h for ``dW = dy' h``. Where h is one sweep over a tensor that another layer keeps anyway (gated GELU over the up
projection's output, a norm over the residual stream) the linear layer keeps only how to compute h: selective recomputation
(Korthikanti et al., 2205.05198), for a hundredth of a step. The same kernel computes h from the same numbers, so no bit of a
gradient changes. In a small model in fp32 h is a fourth of all activations.

The layer keeps a tensor that was changed in place, or replaces another (a hook's, a copy's), as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_NAME = "_recipe"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to compute a tensor again.

    Attributes:
        make: computes it again, without a gradient.
        given: its inputs, kept for the backward pass.
        version: of the tensor, which changes when it is changed in place.
    """

    make: Callable[..., Tensor]
    given: tuple[Tensor | None, ...]
    version: int


def with_recipe(y: Tensor, make: Callable[..., Tensor], *given: Tensor | None) -> Tensor:
    """``y``, which ``make(*given)`` computes again to the bit."""
    if y.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        setattr(y, _NAME, Recipe(make, given, y._version))
    return y


def recipe_of(x: Tensor) -> Recipe | None:
    """How to compute ``x`` again; None: keep it."""
    recipe: Recipe | None = getattr(x, _NAME, None)
    return recipe if recipe is not None and recipe.version == x._version else None

"""Inputs of linear layers that the backward pass computes again, so that they need not be kept.

``y = W h`` keeps h for ``dW = dy' h``. Where h is one sweep over what another layer keeps anyway, gated GELU over what was raised
or a norm over the residual stream, the linear layer keeps how h came about: selective recomputation (Korthikanti et al.,
2205.05198) of what costs a hundredth of a step. The same kernel computes h from the same numbers, so no bit of a gradient hangs on
it. In a small model in fp32 it is a fourth of all activations.

A tensor that was changed in place, or stands for another (a hook's, a copy's), is kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_NAME = "_recipe"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a tensor came about.

    Attributes:
        make: computes it again, without a gradient.
        given: from these; what is kept for the way back.
        version: of the tensor, which changes when it is changed in place.
    """

    make: Callable[..., Tensor]
    given: tuple[Tensor | None, ...]
    version: int


def with_recipe(y: Tensor, make: Callable[..., Tensor], *given: Tensor | None) -> Tensor:
    """``y``, which can be had again as ``make(*given)`` to the bit."""
    if y.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        setattr(y, _NAME, Recipe(make, given, y._version))
    return y


def recipe_of(x: Tensor) -> Recipe | None:
    """How ``x`` can be had again; None: it must be kept."""
    recipe: Recipe | None = getattr(x, _NAME, None)
    return recipe if recipe is not None and recipe.version == x._version else None

"""Summary of a step's gradient before clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientSummary:
    """Norms of a step's gradient, unscaled and not clipped.

    Attributes:
        global_norm: over all parameters; inf or nan if any element is.
        norms: one fp32 scalar per parameter, by name.
        gradients: the unscaled fp32 gradients by name; live until ``zero_grad``.
        accumulated: this process's own gradients as the backward passes left them: in the accumulation format, with the loss scale;
            live until ``zero_grad``.
    """

    global_norm: float
    norms: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    accumulated: Mapping[str, Tensor]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.global_norm)

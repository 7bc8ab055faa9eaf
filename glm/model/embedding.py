"""The embedding look-up, with GLM-130B's gradient shrink and BLOOM's norm as levers.

EGS (GLM-130B, section 2.3): the embedding's gradient is abnormally large before a collapse, so it is multiplied by alpha < 1
while the forward pass is unchanged. With tied matrices there are two ways in: the look-up and the output projection;
``shrink_side`` says which is shrunk. ``gradient_shrink`` is a plain attribute that schedules and responders may move.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm.model.layers import shrink_gradient


class Embedding(nn.Module):
    """A [vocabulary, hidden] matrix.

    Attributes:
        gradient_shrink: EGS's alpha.
        shrink_side: "input", "output" or "both".
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        *,
        gradient_shrink: float,
        shrink_side: Literal["input", "output", "both"],
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))
        self.gradient_shrink = gradient_shrink
        self.shrink_side = shrink_side

    def forward(self, tokens_BT: Tensor) -> Tensor:
        looked_up_BTC = F.embedding(tokens_BT, self.weight)
        return (
            shrink_gradient(looked_up_BTC, self.gradient_shrink)
            if self.shrink_side != "output"
            else looked_up_BTC
        )

    def output_weight(self) -> Tensor:
        """The matrix as the tied output projection uses it."""
        return (
            shrink_gradient(self.weight, self.gradient_shrink) if self.shrink_side != "input" else self.weight
        )

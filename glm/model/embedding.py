"""The embedding look-up, with GLM-130B's gradient shrink and BLOOM's norm as levers.

A token that occurs often sums as many gradients into its row. In half precision on a CPU the layer sums in fp32 and rounds once, as
accelerators do; a sum in half precision would lose gradients as soon as it is 2,048 times as large.

EGS (GLM-130B, section 2.3): the embedding's gradient is abnormally large before a collapse, so EGS multiplies it by alpha < 1 and
leaves the forward pass unchanged. A tied matrix gets gradients from the look-up and from the output projection; ``shrink_side``
says which of them to shrink. ``gradient_shrink`` is a plain attribute that schedules and responders may change.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm.model.layers import shrink_gradient
from glm.precision import upcasts


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_BT: Tensor, weight_VC: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_BT)
        ctx.rows = weight_VC.shape[0]
        return F.embedding(tokens_BT, weight_VC)

    @staticmethod
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[None, Tensor]:
        (tokens_BT,) = ctx.saved_tensors
        wide = torch.ops.aten.embedding_dense_backward(grad_BTC.float(), tokens_BT, ctx.rows, -1, False)
        return None, wide.to(grad_BTC.dtype)


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
        weight_VC = self.weight
        looked_up_BTC: Tensor = (
            _LookUp.apply(tokens_BT, weight_VC)  # type: ignore[no-untyped-call]
            if upcasts(weight_VC)
            else F.embedding(tokens_BT, weight_VC)
        )
        if self.shrink_side == "output":
            return looked_up_BTC
        return shrink_gradient(looked_up_BTC, self.gradient_shrink)

    def output_weight(self) -> Tensor:
        """The matrix as the tied output projection uses it."""
        if self.shrink_side == "input":
            return self.weight
        return shrink_gradient(self.weight, self.gradient_shrink)

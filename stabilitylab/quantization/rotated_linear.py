"""A rotation before any scheme spreads outliers over their block before they are rounded.

(x R)(W R)' = x W' for an orthogonal R (QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406). R = D H / sqrt(n) is block-diagonal,
its blocks the largest power of two up to 1,024 that divides K, with the same random signs in each
(``stabilitylab.formats.hadamard``). The layer applies it to x in every call. The residual stream can be rotated in the weights
instead, at no cost (``folded_rotation``); what ``down_proj`` reads cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.errors import InputError
from stabilitylab.formats import rotate, rotation_signs
from stabilitylab.quantization.weight_on_paper import HasWeightOnPaper

_SEED = 0
_LARGEST = 1024


class RotatedLinear(HasWeightOnPaper, nn.Module):
    """y = layer(x R), the layer's weights being W R.

    Args:
        layer: a quantized layer of W R.
        scheme: for reports.
    """

    signs: Tensor
    smooth = None

    def __init__(self, layer: Any, scheme: Any) -> None:
        super().__init__()
        self.layer, self.scheme = layer, scheme
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.register_buffer("signs", signs_for(self.in_features, "the layer"), persistent=False)
        self.register_buffer("computes", torch.empty(0), persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights; the rotation is a function of K."""
        return int(self.layer.nbytes)

    def prepare(self) -> None:
        """Hand the weights to the inner layer's kernel."""
        self.layer.prepare()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, in the input's format. x: [..., K]."""
        y: Tensor = self.layer(rotate(x.float(), self.signs).to(x.dtype))
        return y

    def extra_repr(self) -> str:
        return f"scheme={self.scheme.name}"


def rotated_weight(weight: Tensor, name: str) -> Tensor:
    """W R in fp32, [N, K]."""
    return rotate(weight.detach().float(), signs_for(weight.shape[1], name).to(weight.device))


def signs_for(columns: int, name: str) -> Tensor:
    """The signs of the rotation of this many columns. Raises InputError where no block of at least 2 divides them."""
    size = min(columns & -columns, _LARGEST)
    if size < 2:
        raise InputError(f"{name} has {columns} columns, an odd number, which no Hadamard matrix rotates")
    return rotation_signs(size, _SEED)

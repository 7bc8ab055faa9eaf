"""What a model may ask of the weight of a layer that no longer has one: its format, its device, its shape.

Some models look at ``layer.weight.dtype`` before they call the layer (Mamba-2's and Mamba's output, T5's ``wo``). A quantized layer
answers such a question. A model that multiplies with the answer gets an error at once, since it is no tensor: numbers of another
matrix than the quantized one would be wrong in silence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOnPaper:
    """Stands for a weight [N, K].

    Attributes:
        dtype: in which the layer computes with floats.
        device: where it is.
        shape: N and K.
    """

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        """As a tensor's."""
        return len(self.shape)


class HasWeightOnPaper:
    """Gives a quantized layer a ``weight`` to look at.

    The layer keeps an empty buffer ``computes``, not saved, which moves and changes its format as the model does; ``put``
    (replacement.py) gives it the format of the layer in whose place it is set.
    """

    computes: Tensor
    out_features: int
    in_features: int

    @property
    def weight(self) -> WeightOnPaper:
        return WeightOnPaper(
            dtype=self.computes.dtype,
            device=self.computes.device,
            shape=torch.Size((self.out_features, self.in_features)),
        )

"""Keys and values of earlier tokens, so that generation computes each token once.

Shapes: B rows, H heads, T new tokens, S tokens in all, D dimensions a head. The cache allocates room for the longest text at once,
so that a step writes its own tokens and copies nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm.model.config import ModelConfig


class LayerCache:
    """Keys (turned already) and values of one layer."""

    def __init__(self, keys_BHSD: Tensor, values_BHSD: Tensor) -> None:
        self._keys, self._values = keys_BHSD, values_BHSD
        self.length = 0

    def extend(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens; returns all keys and values so far, [B, H, S, D] each."""
        end = self.length + keys_BHTD.shape[2]
        self._keys[:, :, self.length : end] = keys_BHTD
        self._values[:, :, self.length : end] = values_BHTD
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def reorder(self, rows_B: Tensor) -> None:
        """Row b becomes the former row ``rows_B[b]``."""
        for kept in (self._keys, self._values):
            kept[:, :, : self.length] = kept[rows_B, :, : self.length]


class Cache:
    """The caches of all layers, and the positions of their tokens (ALiBi needs the keys').

    Args:
        config: of the model.
        rows: B.
        length: most tokens that it holds.
        like: a tensor of the model's format and device.
    """

    def __init__(self, config: ModelConfig, *, rows: int, length: int, like: Tensor) -> None:
        shape = (rows, config.key_heads, length, config.head)
        self.layers = tuple(
            LayerCache(like.new_empty(shape), like.new_empty(shape)) for _ in range(config.layers)
        )
        self._place_BS = torch.zeros((rows, length), dtype=torch.int64, device=like.device)

    @property
    def length(self) -> int:
        """Tokens in it."""
        return self.layers[0].length

    def extend_places(self, place_BT: Tensor) -> Tensor:
        """Append the positions of the new tokens, before the layers compute them; returns all, [B, S]."""
        end = self.length + place_BT.shape[1]
        self._place_BS[:, self.length : end] = place_BT
        return self._place_BS[:, :end]

    def reorder(self, rows_B: Tensor) -> None:
        """Row b becomes the former row ``rows_B[b]``, as beam search needs."""
        self._place_BS[:, : self.length] = self._place_BS[rows_B, : self.length]
        for layer in self.layers:
            layer.reorder(rows_B)

"""The numbers that weights can become in a scheme, with scales that are taken group by group: what GPTQ rounds to."""

from __future__ import annotations

import torch
from torch import Tensor

from stabilitylab.formats import Quantized, quantize, round_to
from stabilitylab.quantization.scheme import Scheme
from stabilitylab.quantization.stored_weight import StoredWeight, affine_rows, pack_nibbles, scale_format


class IntegerGrid:
    """w = (code - zero) scale, a scale and zero point for each row and group of columns.

    Args:
        scheme: integers; not with one scale for the whole tensor.
        shape: N and K.
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        rows, columns = shape
        self._scheme, self._shape = scheme, shape
        self.group = scheme.share if isinstance(scheme.share, int) else max(columns, 1)
        groups = -(-columns // self.group)
        self._scales_GN = torch.ones(groups, rows, dtype=scale_format(scheme))
        self._wide_GN = torch.ones(groups, rows)
        self._zeros_GN = torch.zeros(groups, rows)
        self._top = 2**scheme.bits - 1
        self._bottom = 0 if scheme.asymmetric else 1

    def open(self, start: int, part_Ng: Tensor) -> None:
        at = start // self.group
        _, scale, zero = affine_rows(part_Ng.float().contiguous(), self._scheme, self.group)
        self._scales_GN[at], self._wide_GN[at], self._zeros_GN[at] = scale[:, 0], scale[:, 0], zero[:, 0]

    def round(self, column_N: Tensor, k: int) -> Tensor:
        scale_N, zero_N = self._wide_GN[k // self.group], self._zeros_GN[k // self.group]
        code_N = (column_N / scale_N).round_().add_(zero_N).clamp_(self._bottom, self._top)
        return code_N.sub_(zero_N).mul_(scale_N)

    def stored(self, rounded_NK: Tensor, fingerprint: str) -> StoredWeight:
        """Numbers on the grid in the canonical form."""
        columns = self._shape[1]
        scale_NK = self._wide_GN.T.repeat_interleave(self.group, 1)[:, :columns]
        zero_NK = self._zeros_GN.T.repeat_interleave(self.group, 1)[:, :columns]
        codes = ((rounded_NK.float() / scale_NK).round() + zero_NK).to(torch.uint8)
        scheme = self._scheme
        packed = pack_nibbles(codes) if scheme.bits == 4 else (codes.to(torch.int16) - 128).to(torch.int8)
        return StoredWeight(
            values=packed,
            scales=self._scales_GN.T.contiguous(),
            zeros=self._zeros_GN.T.to(torch.uint8).contiguous() if scheme.asymmetric else None,
            bits=scheme.bits,
            shape=self._shape,
            group=self.group,
            fingerprint=fingerprint,
        )


class FormatGrid:
    """A small floating-point format with the scales of the unrounded weight.

    Args:
        like: the weight rounded to nearest, whose scales are used.
    """

    def __init__(self, like: Quantized) -> None:
        self._like = like
        self._format = like.format
        rows, columns = like.codes.shape
        self.group = max(columns, 1)
        wide = torch.ones(1, 1) if like.scales is None else like.scales.float()
        if like.tensor_scale is not None:
            wide = wide * like.tensor_scale
        sizes = zip(self._format.block, (rows, columns), strict=True)
        down, self._across = (max(size if block is None else block, 1) for block, size in sizes)
        self._scales_GN = wide.repeat_interleave(down, 0)[:rows].T.contiguous()

    def open(self, start: int, part_Ng: Tensor) -> None:
        """Nothing: the scales exist."""

    def round(self, column_N: Tensor, k: int) -> Tensor:
        scale_N = self._scales_GN[k // self._across]
        divided_N = torch.where(scale_N == 0, 0.0, column_N / scale_N)
        return (round_to(divided_N, self._format.element) * scale_N).to(column_N.dtype)

    def stored(self, rounded_NK: Tensor) -> Quantized:
        """Numbers on the grid as codes."""
        return quantize(rounded_NK, self._format, like=self._like)

"""Kernel dispatch: what a kernel is, and which one a layer gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from stabilitylab.quantization.kernels.cuda import CudaInt4, CudaInt8, cuda_int4_agrees, cuda_int8_agrees
from stabilitylab.quantization.kernels.fbgemm import FbgemmInt8, fbgemm_agrees
from stabilitylab.quantization.kernels.packed import (
    PackedInt4,
    PackedInt8,
    packed_int4_agrees,
    packed_int8_agrees,
)
from stabilitylab.quantization.kernels.tiles import TiledInt8, TiledWeight
from stabilitylab.quantization.stored_weight import StoredWeight


class WeightKernel(Protocol):
    """Multiplies activations as they come with quantized weights."""

    def __call__(self, x_MK: Tensor) -> Tensor:
        """x W', [M, N], in the kernel's own format. M is at least 1."""

    def values(self) -> Tensor:
        """The codes in the canonical form."""


class IntegerKernel(Protocol):
    """Multiplies integers with int8 weights, exactly, and scales the result by the weights' scales."""

    def __call__(self, codes_MK: Tensor, signed: int) -> Tensor:
        """codes W', float32 [M, N].

        Args:
            codes_MK: float32 with integers in -127 ... 127. M is at least 1.
            signed: rows from this one on hold no negative number.
        """

    def values(self) -> Tensor:
        """The codes in the canonical form."""


def weight_kernel(stored: StoredWeight) -> WeightKernel:
    """The kernel for weight-only schemes, on the device of ``stored``."""
    kind = stored.values.device.type
    one_a_row = stored.scales.shape[1] == 1
    if kind == "cpu" and stored.bits == 4 and (one_a_row or stored.group in (32, 64, 128)):
        if packed_int4_agrees():
            return PackedInt4(stored)
    elif kind == "cpu" and one_a_row and stored.zeros is None:
        if packed_int8_agrees():
            return PackedInt8(stored)
    elif kind == "cuda" and stored.bits == 4 and cuda_int4_agrees(stored.values.device):
        return CudaInt4(stored)
    return TiledWeight(stored)


def integer_kernel(stored: StoredWeight) -> IntegerKernel:
    """The kernel for int8 activations, on the device of ``stored``."""
    if stored.scales.shape[0] == 1 and stored.shape[0] > 1:
        stored = replace(stored, scales=stored.scales.expand(stored.shape[0], 1))
    device = stored.values.device
    if device.type == "cpu" and fbgemm_agrees():
        return FbgemmInt8(stored)
    if device.type == "cuda" and cuda_int8_agrees(device):
        return CudaInt8(stored)
    return TiledInt8(stored)

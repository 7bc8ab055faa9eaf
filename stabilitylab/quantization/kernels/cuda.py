"""The same products on CUDA devices. A kernel that fails its self-check leaves the work to dequantized tiles.

``torch._int_mm`` wants more than 16 rows and K, N multiples of 8; ``_weight_int4pack_mm`` wants bf16 activations, N a multiple of
64 here, K of 128, and its own order of nibbles: even columns high.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from stabilitylab.quantization.kernels.tiles import padded
from stabilitylab.quantization.scheme import Scheme
from stabilitylab.quantization.stored_weight import StoredWeight, quantize_weight

_INNER_TILES = 8


class CudaInt8:
    """See ``IntegerKernel``."""

    def __init__(self, stored: StoredWeight) -> None:
        self._shape = stored.shape
        self._values = padded(stored.values, columns=16, rows=16)
        self._scales = stored.scales.reshape(-1)

    def __call__(self, codes_MK: Tensor, signed: int) -> Tensor:
        count = codes_MK.shape[0]
        codes = padded(codes_MK.to(torch.int8), columns=16, rows=32)
        product = torch._int_mm(codes, self._values.T)
        return product[:count, : self._shape[0]].float() * self._scales

    def values(self) -> Tensor:
        return self._values[: self._shape[0], : self._shape[1]].contiguous()


class CudaInt4:
    """See ``WeightKernel``. Holds the canonical codes for many rows and the packed ones for few."""

    def __init__(self, stored: StoredWeight) -> None:
        self._stored = stored
        rows = stored.shape[0]
        one_a_row = stored.scales.shape[1] == 1
        self._group = 128 if one_a_row else stored.group
        codes = padded(stored.codes(), columns=128, rows=64)
        self._packed = torch.ops.aten._convert_weight_to_int4pack(
            (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), _INNER_TILES
        )
        scales = stored.scales.float()
        zeros = torch.full_like(scales, 8.0) if stored.zeros is None else stored.zeros.float()
        both = torch.stack([scales, (8.0 - zeros) * scales], -1).to(torch.bfloat16)
        groups = codes.shape[1] // self._group
        both = both.expand(rows, groups, 2) if one_a_row else F.pad(both, (0, 0, 0, groups - both.shape[1]))
        self._scales = F.pad(both, (0, 0, 0, 0, 0, -rows % 64)).transpose(0, 1).contiguous()

    def __call__(self, x_MK: Tensor) -> Tensor:
        if x_MK.shape[0] > 64:
            return x_MK @ self._stored.dequantize(x_MK.dtype).T
        x = padded(x_MK.to(torch.bfloat16), columns=128)
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, self._packed, self._group, self._scales)
        return y[:, : self._stored.shape[0]]

    def values(self) -> Tensor:
        return self._stored.values


@cache
def cuda_int8_agrees(device: torch.device) -> bool:
    """Whether int8 products are exact on this device."""
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randint(-127, 128, shape, generator=generator) for shape in ((40, 100), (3, 100)))
    try:
        stored = StoredWeight(
            values=w.to(torch.int8).to(device),
            scales=torch.ones(40, 1, device=device),
            zeros=None,
            bits=8,
            shape=(40, 100),
            group=100,
            fingerprint="",
        )
        y = CudaInt8(stored)(x.float().to(device), 3)
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(y.cpu(), (x.double() @ w.double().T).float())


@cache
def cuda_int4_agrees(device: torch.device) -> bool:
    """Whether int4 products agree with the reference within bf16's rounding on this device."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 200, generator=generator).to(device)
    x = torch.randn(3, 200, generator=generator).to(device, torch.bfloat16)
    try:
        for scheme in (Scheme(bits=4), Scheme(bits=4, share=32, asymmetric=True)):
            stored = quantize_weight(weight, scheme)
            restored = stored.dequantize(torch.float64)
            magnitude = x.abs().double() @ (restored.abs().T + 8 * stored.scales.double().amax())
            error = (CudaInt4(stored)(x).double() - x.double() @ restored.T).abs()
            if not bool((error <= 2**-8 * magnitude).all()):
                return False
    except (RuntimeError, AttributeError):
        return False
    return True

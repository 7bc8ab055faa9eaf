"""int8 x int8 with FBGEMM, which torch brings along on x86: exact on every such processor.

FBGEMM multiplies unsigned activations with signed weights. Without VNNI it does so by ``vpmaddubsw``, whose sum of two products

    a1 b1 + a2 b2,    a in 0 ... 255, b in -127 ... 127

is cut off at 16 bits. (Measured: with a zero point of 128 and random codes, errors of 1 in 10 of the largest output.) Instead of
giving up a bit of the activations ("reduce_range"), the sign is split off:

    x W' = x+ W' - x- W',    x+ and x- in 0 ... 127,    2 * 127 * 127 = 32,258 < 2^15

twice the rows, still far quicker than fp32 there up to some hundred rows. Where the self-check finds no saturation, codes are
shifted by 128 and go through once. The packed weights are the only copy held.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from stabilitylab.quantization.stored import StoredWeight


class FbgemmInt8:
    """See ``IntegerKernel``."""

    def __init__(self, stored: StoredWeight) -> None:
        self._packed = _pack(stored.values, stored.scales.view(-1))
        self._direct = fbgemm_agrees() == "direct"

    def __call__(self, codes_MK: Tensor, signed: int) -> Tensor:
        if self._direct:
            return _product(codes_MK, 128, self._packed)
        count = codes_MK.shape[0]
        rows = codes_MK.new_empty(count + signed, codes_MK.shape[1])
        torch.clamp(codes_MK, min=0, out=rows[:count])
        torch.clamp(codes_MK[:signed], max=0, out=rows[count:]).neg_()
        y_MN = _product(rows, 0, self._packed)
        y_MN[:signed].sub_(y_MN[count:])
        return y_MN[:count]

    def values(self) -> Tensor:
        with _quietly():
            unpacked: Tensor = torch.ops.quantized.linear_unpack(self._packed)[0].int_repr()
        return unpacked


@cache
def fbgemm_agrees() -> Literal["direct", "split"] | None:
    """How FBGEMM is exact on this machine, if it is: on odd shapes, random codes and the largest ones."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    generator = torch.Generator().manual_seed(0)
    exact: dict[Literal["direct", "split"], bool] = {"direct": True, "split": True}
    try:
        for count, columns, rows in ((1, 1, 1), (3, 130, 65), (20, 1040, 40)):
            for extreme in (False, True):
                shapes = (rows, columns), (count, columns)
                w, x = (torch.randint(-127, 128, shape, generator=generator) for shape in shapes)
                if extreme:
                    w, x = w.sign() * 127, x.abs().sign() * 127
                packed = _pack(w.to(torch.int8), torch.ones(rows))
                expected = (x.double() @ w.double().T).float()
                codes = x.float()
                split = _product(codes.clamp(min=0), 0, packed) - _product(-codes.clamp(max=0), 0, packed)
                exact["split"] &= torch.equal(split, expected)
                exact["direct"] &= torch.equal(_product(codes, 128, packed), expected)
    except (RuntimeError, AttributeError):  # an operation that this build of torch lacks
        return None
    return "direct" if exact["direct"] else "split" if exact["split"] else None


def _pack(values: Tensor, scales: Tensor) -> Any:
    """Weights in FBGEMM's layout, each output channel with its scale."""
    zeros = torch.zeros(values.shape[0], dtype=torch.long)
    with _quietly():
        weight = torch._make_per_channel_quantized_tensor(
            values.contiguous(), scales.double().contiguous(), zeros, 0
        )
        return torch.ops.quantized.linear_prepack(weight, None)


def _product(codes_MK: Tensor, zero: int, packed: Any) -> Tensor:
    """(round(codes) + zero as uint8, minus zero) W', scaled: float32."""
    y_MN: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        codes_MK, 1.0, zero, packed
    )
    return y_MN


@contextmanager
def _quietly() -> Iterator[None]:
    """FBGEMM as the engine, and no word about quantized tensors being on their way out: they live for one call here.

    Should they go, the self-check fails and another kernel is taken.
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.quantized.engine = before

"""int8 x int8 with FBGEMM, which torch brings along on x86: exact on every such processor.

FBGEMM multiplies unsigned activations with signed weights. Without VNNI it does so by ``vpmaddubsw``, whose sum of two products

    a1 b1 + a2 b2,    a in 0 ... 255, b in -127 ... 127

is cut off at 16 bits. (Measured: with a zero point of 128 and random codes, errors of 1 in 10 of the largest output.) Instead of
giving up a bit of the activations ("reduce_range"), the kernel takes one of three exact ways:

    direct       where the self-check finds no saturation: codes are shifted by 128 and go through once
    corrected    pairs of neighbouring weights are clipped to |b1| + |b2| <= 128, so that 255 * 128 = 32,640 < 2^15 bounds
                 the sum, and what was clipped is a sparse matrix R:    x W' = x (W - R)' + x R'
    split        x W' = x+ W' - x- W',    x+ and x- in 0 ... 127,    2 * 127 * 127 = 32,258 < 2^15:    twice the rows

Weights whose largest is 4 deviations away, as is usual, leave 1 to 2 % of R non-zero, and a sparse product of that costs an eighth
of what a second pass would. Beyond 4 % the kernel splits the sign. R takes 8 bytes a non-zero; otherwise the packed weights are the
only copy held.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from stabilitylab.quantization.stored_weight import StoredWeight

Way = Literal["direct", "corrected", "split"]

_DENSEST = 0.04  # of the corrections: beyond, splitting the sign is quicker
_PAIR = 128  # what two neighbouring weights may add up to


class FbgemmInt8:
    """See ``IntegerKernel``."""

    def __init__(self, stored: StoredWeight) -> None:
        values, self._scales = stored.values, stored.scales.view(-1)
        self._way: Way = fbgemm_agrees() or "split"
        self._correction: Tensor | None = None
        if self._way == "corrected":
            kept = clip_pairs(values)
            rows, columns = (kept != values).nonzero(as_tuple=True)
            if len(rows) > _DENSEST * values.numel():
                self._way = "split"
            elif len(rows):
                off = values[rows, columns].float() - kept[rows, columns].float()
                self._correction = _sparse(rows, columns, off, values.shape)
            if self._way == "corrected":
                values = kept
        self._packed = _pack(values, self._scales)

    def __call__(self, codes_MK: Tensor, signed: int) -> Tensor:
        if self._way != "split":
            y_MN = _product(codes_MK, 128, self._packed)
            if self._correction is not None:
                y_MN.addcmul_(torch.mm(self._correction, codes_MK.T).T, self._scales)
            return y_MN
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
            if self._correction is not None:
                at = self._correction.to_sparse_coo()  # type: ignore[no-untyped-call]
                unpacked[at.indices()[0], at.indices()[1]] += at.values().to(torch.int8)
        return unpacked


def clip_pairs(values_NK: Tensor) -> Tensor:
    """int8 weights of which neighbours, columns 2j and 2j + 1, have magnitudes that add up to 128 at most: the larger gives way."""
    wide = torch.nn.functional.pad(values_NK, (0, values_NK.shape[1] % 2)).to(torch.int16)
    pairs = wide.view(values_NK.shape[0], -1, 2)
    size = pairs.abs()
    over = (size.sum(-1) - _PAIR).clamp_(min=0)
    first = size[..., 0] >= size[..., 1]
    less = torch.stack([torch.where(first, over, 0), torch.where(first, 0, over)], -1)
    clipped = (pairs - pairs.sign() * less).view_as(wide)[:, : values_NK.shape[1]]
    return clipped.to(torch.int8).contiguous()


@cache
def fbgemm_agrees() -> Way | None:
    """The quickest way in which FBGEMM is exact on this machine: on odd shapes, random codes and the largest ones."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    generator = torch.Generator().manual_seed(0)
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    exact: dict[Way, bool] = {"direct": True, "corrected": has_mkl, "split": True}
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
                # Pairs at the bound: equal halves or one all there is, of one sign or two, under the largest activations.
                clipped = clip_pairs(w.to(torch.int8))
                product = _product(codes, 128, _pack(clipped, torch.ones(rows)))
                exact["corrected"] &= torch.equal(product, (x.double() @ clipped.double().T).float())
    except (RuntimeError, AttributeError):  # an operation that this build of torch lacks
        return None
    return next((way for way, right in exact.items() if right), None)


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """A matrix in compressed rows, which MKL multiplies; positions in the order of ``nonzero``."""
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    with _quietly():
        return torch.sparse_csr_tensor(starts, columns.int(), values, shape)


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
    """Makes FBGEMM the engine, and silences the word that quantized tensors are on their way out: they live for one call here.

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

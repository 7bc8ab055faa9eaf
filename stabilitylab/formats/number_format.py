"""Small floating-point formats: which numbers they hold, and how a number becomes one of them.

A format of E exponent and M mantissa bits with bias b holds, for exponent field f and mantissa k < 2^M,

    f > 0   (1 + k / 2^M) 2^(f - b)            f = 0   k / 2^M 2^(1 - b)              and each with its sign

so between 2^e and 2^(e+1), e >= 1 - b, its numbers are multiples of a step 2^(e-M), and below that of 2^(1-b-M). Rounding takes x /
step to an integer k: to nearest, ties to even (IEEE 754), or stochastically, up with the probability of the remainder (Gupta et
al., 1502.02551), so that the mean over draws is x. The code is then (e - 1 + b) 2^M + k, sign apart: the hidden bit in k carries
into the exponent by itself.

    name   E M b   largest   infinity, NaN         source
    e4m3   4 3 7   448       no, one a sign        FP8 (2209.05433), table 1; torch.float8_e4m3fn
    e5m2   5 2 15  57,344    as in IEEE 754        the same; torch.float8_e5m2
    e2m3   2 3 1   7.5       no, no                OCP Microscaling Formats 1.0, section 5.3
    e3m2   3 2 3   28        no, no                the same
    e2m1   2 1 1   6         no, no                the same; torch.float4_e2m1fn_x2
    fp16   5 10 15 65,504    as in IEEE 754        binary16
    bf16   8 7 127 3.4e38    as in IEEE 754        bfloat16

Limits: rounding takes a number in fp32, which holds all of these exactly; one from float64 is rounded to fp32 first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stabilitylab.errors import InputError

Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """A binary floating-point format of at most 16 bits.

    Attributes:
        name: what people call it.
        exponent_bits, mantissa_bits, bias: E, M and b.
        largest: largest finite number.
        specials: "ieee": the highest exponent is infinity and NaN; "nan": only the highest code is NaN; "none": all are numbers.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float
    specials: Literal["ieee", "nan", "none"]

    @property
    def bits(self) -> int:
        """Bits of a code, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest positive number."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def largest_exponent(self) -> int:
        """floor(log2) of the largest number."""
        return math.frexp(self.largest)[1] - 1


E4M3 = NumberFormat(name="e4m3", exponent_bits=4, mantissa_bits=3, bias=7, largest=448.0, specials="nan")
E5M2 = NumberFormat(name="e5m2", exponent_bits=5, mantissa_bits=2, bias=15, largest=57_344.0, specials="ieee")
E2M3 = NumberFormat(name="e2m3", exponent_bits=2, mantissa_bits=3, bias=1, largest=7.5, specials="none")
E3M2 = NumberFormat(name="e3m2", exponent_bits=3, mantissa_bits=2, bias=3, largest=28.0, specials="none")
E2M1 = NumberFormat(name="e2m1", exponent_bits=2, mantissa_bits=1, bias=1, largest=6.0, specials="none")
FP16 = NumberFormat(
    name="fp16", exponent_bits=5, mantissa_bits=10, bias=15, largest=65_504.0, specials="ieee"
)
BF16 = NumberFormat(
    name="bf16",
    exponent_bits=8,
    mantissa_bits=7,
    bias=127,
    largest=torch.finfo(torch.bfloat16).max,
    specials="ieee",
)

NUMBER_FORMATS: Mapping[str, NumberFormat] = {
    one.name: one for one in (E4M3, E5M2, E2M3, E3M2, E2M1, FP16, BF16)
}
# torch's own type of a format, and torch's cast into it, which rounds to nearest even.
TORCH_TYPES: Mapping[str, torch.dtype] = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def number_format(name: str) -> NumberFormat:
    """The format of that name. Raises InputError with the names there are."""
    if name not in NUMBER_FORMATS:
        raise InputError(f"there is no number format {name!r}: choose one of {', '.join(NUMBER_FORMATS)}")
    return NUMBER_FORMATS[name]


def round_to(
    x: Tensor,
    format: NumberFormat,
    *,
    rounding: Rounding = "nearest",
    saturate: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x on the format's numbers, in fp32.

    Args:
        x: any shape, any floating format.
        format: whose numbers.
        rounding: "nearest" (ties to even) or "stochastic".
        saturate: finite numbers beyond the largest become the largest; otherwise infinity, or NaN where there is none.
            Infinity itself stays, or is NaN where the format has none, or the largest number where it has neither.
        generator: of the stochastic rounding, on x's device; None: torch's default.
    """
    wide = x.float()
    # On a CPU torch reads FP8 more slowly than all of the arithmetic below runs.
    by_cast = format.name in TORCH_TYPES and not (saturate and format.bits == 8 and wide.device.type == "cpu")
    if rounding == "nearest" and by_cast:
        # Clamped first: torch's versions differ in what their casts make of numbers beyond the largest.
        limited = wide.clamp(-format.largest, format.largest)
        rounded = limited.to(TORCH_TYPES[format.name]).float()
        beyond = None if saturate else _overflows(wide, format)
    elif format is BF16:
        rounded = _stochastic_bf16(wide, generator).clamp(-format.largest, format.largest)
        beyond = None if saturate else rounded.abs() > format.largest
    else:
        count, step, _ = _in_steps(wide, format, rounding, generator)
        rounded = _with_sign(count.mul_(step), wide)
        beyond = None if saturate else rounded.abs() > format.largest
        rounded = rounded.clamp_(-format.largest, format.largest)
    return _with_specials(rounded, wide, format, beyond)


def encode(
    x: Tensor,
    format: NumberFormat,
    *,
    rounding: Rounding = "nearest",
    saturate: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Bit patterns of ``round_to``: uint8 for up to 8 bits, else int32; a code of fewer than 8 bits lies in the low ones."""
    on_grid = round_to(x, format, rounding=rounding, saturate=saturate, generator=generator)
    count, _, exponent = _in_steps(on_grid.nan_to_num(0.0, 0.0, 0.0), format, "nearest", None)
    code = ((exponent - (1 - format.bias)) << format.mantissa_bits) + count.int()
    top = ((1 << format.exponent_bits) - 1) << format.mantissa_bits
    if format.specials == "ieee":
        code = torch.where(on_grid.isinf(), top, code)
        code = torch.where(on_grid.isnan(), top + (1 << (format.mantissa_bits - 1)), code)
    elif format.specials == "nan":
        code = torch.where(on_grid.isnan(), top + (1 << format.mantissa_bits) - 1, code)
    code = code + (torch.signbit(on_grid).int() << (format.bits - 1))
    return code.to(torch.uint8) if format.bits <= 8 else code


def decode(code: Tensor, format: NumberFormat) -> Tensor:
    """The numbers that codes stand for, in fp32."""
    if format.bits > 8:
        return _decoded(code.int(), format)
    return _all_values(format).to(code.device)[code.int()]


@functools.cache
def _all_values(format: NumberFormat) -> Tensor:
    """The number of every code, in order; bits above the format's are ignored, so all 256 bytes have one."""
    return _decoded(torch.arange(256, dtype=torch.int32), format)


def _decoded(wide: Tensor, format: NumberFormat) -> Tensor:
    magnitude = wide & ((1 << (format.bits - 1)) - 1)
    field = magnitude >> format.mantissa_bits
    fraction = magnitude & ((1 << format.mantissa_bits) - 1)
    hidden = (field > 0).int() << format.mantissa_bits
    # A step of bf16's smallest numbers is below fp32's normal ones, and exact in float64.
    step = torch.exp2((field.clamp_min(1) - format.bias - format.mantissa_bits).double())
    value = ((fraction + hidden) * step).float()
    top = (1 << format.exponent_bits) - 1
    if format.specials == "ieee":
        value = torch.where(field == top, torch.where(fraction == 0, torch.inf, torch.nan), value)
    elif format.specials == "nan":
        value = torch.where(
            magnitude == (1 << (format.exponent_bits + format.mantissa_bits)) - 1, torch.nan, value
        )
    return torch.where((wide >> (format.bits - 1)) & 1 == 1, -value, value)


def pack_4bit(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the low half, as ``torch.float4_e2m1fn_x2`` has them: [..., K] -> [..., K / 2].

    Raises InputError where K is odd.
    """
    if codes.shape[-1] % 2:
        raise InputError(
            f"two 4-bit codes share a byte: the last dimension must be even, got {codes.shape[-1]}"
        )
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_4bit(packed: Tensor) -> Tensor:
    """[..., K / 2] bytes -> [..., K] codes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _in_steps(
    x: Tensor, format: NumberFormat, rounding: Rounding, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """|x| in steps of the format, rounded; the step; and the exponent e that it belongs to."""
    magnitude = x.abs()
    # The exponent field of fp32 is floor(log2) for normal numbers, and too low for others, which are below every step here.
    field = magnitude.view(torch.int32) >> 23
    exponent = field.sub_(127).clamp_(min=1 - format.bias)
    if format.bias < 127:
        step = ((exponent + (127 - format.mantissa_bits)) << 23).view(torch.float32)
    else:
        magnitude = magnitude.double()
        step = torch.exp2((exponent - format.mantissa_bits).double())
    count = magnitude / step
    if rounding == "nearest":
        return count.round_(), step, exponent
    drawn = torch.rand(count.shape, generator=generator, device=count.device, dtype=count.dtype)
    return (count + drawn).floor_(), step, exponent


def _with_sign(magnitude: Tensor, x: Tensor) -> Tensor:
    """The magnitude, in place where it is fp32, with x's sign: torch's own ``copysign`` is not vectorized on a CPU."""
    if magnitude.dtype != torch.float32:
        return torch.copysign(magnitude, x)
    magnitude.view(torch.int32).bitwise_or_(x.contiguous().view(torch.int32) & -(1 << 31))
    return magnitude


def _overflows(x: Tensor, format: NumberFormat) -> Tensor:
    """Whether x rounds to more than the largest number: from half a step above it on, the tie going to the even one."""
    largest = format.largest
    half = 2.0 ** (format.largest_exponent - format.mantissa_bits - 1)
    even = int(largest / (2 * half)) % 2 == 0
    return x.abs() > largest + half if even else x.abs() >= largest + half


def _stochastic_bf16(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """bf16 is fp32 without its last 16 bits: adds random ones to them, and cuts off what does not carry."""
    drawn = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    rounded = ((x.contiguous().view(torch.int32) + drawn) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def _with_specials(rounded: Tensor, x: Tensor, format: NumberFormat, beyond: Tensor | None) -> Tensor:
    """Put infinity and NaN where x has them, and where it is ``beyond`` the largest number."""
    if format.specials == "none":
        return rounded.nan_to_num_(0.0)
    if beyond is not None:
        over = torch.inf if format.specials == "ieee" else torch.nan
        rounded = torch.where(beyond, torch.copysign(torch.full_like(x, over), x), rounded)
    infinite = x.isinf()
    special = x if format.specials == "ieee" else torch.copysign(torch.full_like(x, torch.nan), x)
    return torch.where(infinite, special, rounded)

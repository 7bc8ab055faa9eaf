"""The one form in which quantized weights are kept: on disk, between devices, and as the reference of every kernel.

W [N, K] (N output channels, K columns; G groups of columns a row) becomes

    values  int8 [N, K], or uint8 [N, ceil(K/2)]: two int4 a byte, column j low and column j + ceil(K/2) high
    scales  [N, G] (one scale for everything: [1, 1]); bfloat16 for weight-only schemes, else float32
    zeros   uint8 [N, G] codes that mean 0, or absent: then the middle code means 0

    w[n, k] = (code[n, k] - zero[n, g(k)]) * scale[n, g(k)],       code in 0 ... 2^b - 1, int8 value = code - 128

Symmetric (absmax; GLM-130B, section 5): scale = max|w| / (2^(b-1) - 1), (W8A8: max|w| / 127.5),
code - zero in -(2^(b-1) - 1) ... 2^(b-1) - 1.
Asymmetric (Jacob et al., 1712.05877): scale = (max - min) / (2^b - 1) over a range that holds 0, so 0 stays 0.

The scale is rounded up to its stored format before the weights are rounded with it, so every weight is at most half a step from its
code. A group of zeros has scale 1: it stays zero and divides nothing by zero. With ``search``, each group tries ranges shrunk by up
to 45 % and keeps the one of least squared error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.models.freed_memory import let_go_of_pages
from stabilitylab.quantization.scheme import INT8_RANGE, Scheme

_CHUNK = 1 << 20  # weights that are looked at together, which bounds the memory beside the result
_SHRINK = tuple(1.0 - 0.05 * step for step in range(10))


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredWeight:
    """Quantized weights of a linear layer. See the head of the module for the layout.

    Attributes:
        values: codes.
        scales: of the groups.
        zeros: codes that mean 0; None if that is the middle one.
        bits: 8 or 4.
        shape: output channels and columns.
        group: columns that share a scale.
        fingerprint: the first 16 hexadecimal digits of the SHA-256 of the float32 weights it was made from.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    shape: tuple[int, int]
    group: int
    fingerprint: str

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and zero points."""
        parts = [self.values, self.scales] + ([] if self.zeros is None else [self.zeros])
        return sum(part.numel() * part.element_size() for part in parts)

    def codes(self, rows: slice = slice(None)) -> Tensor:
        """Codes of some rows, [n, K] uint8."""
        values = self.values[rows]
        if self.bits == 8:
            return (values.to(torch.int16) + 128).to(torch.uint8)
        return unpack_nibbles(values, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        """Weights of some rows, [n, K]."""
        wide = torch.promote_types(dtype, torch.float32)
        if self.bits == 8:
            signed, middle = self.values[rows].to(wide), 128
        else:
            signed, middle = unpack_nibbles(self.values[rows], self.shape[1]).to(wide).sub_(8), 8
        scales = (self.scales[rows] if self.scales.shape[0] > 1 else self.scales).to(wide)
        offset = None if self.zeros is None else self.zeros[rows].to(wide) - middle
        if self.scales.shape[1] == 1:
            weights = signed if offset is None else signed.sub_(offset)
            return weights.mul_(scales).to(dtype)
        spare = self.scales.shape[1] * self.group - self.shape[1]
        padded = torch.nn.functional.pad(signed, (0, spare)) if spare else signed
        grouped = padded.view(padded.shape[0], -1, self.group)
        grouped = grouped if offset is None else grouped.sub_(offset[..., None])
        return grouped.mul_(scales[..., None]).view_as(padded)[:, : self.shape[1]].to(dtype).contiguous()


def quantize_weight(
    weight: Tensor, scheme: Scheme, *, smooth: Tensor | None = None, name: str = "the weight"
) -> StoredWeight:
    """Quantize W [N, K].

    Args:
        weight: any floating format, finite.
        scheme: which scales there are.
        smooth: [K], multiplied into the columns first (SmoothQuant).
        name: how errors call it.

    Raises:
        InputError: W is not finite.
    """
    weight = weight.detach()
    rows, columns = weight.shape
    group = scheme.share if isinstance(scheme.share, int) else max(columns, 1)
    values: Tensor | None = None  # made once, so that codes are never held twice
    scales, zeros, done = [], [], 0
    digest = hashlib.sha256()
    one_scale = _largest(weight, smooth) / INT8_RANGE if scheme.share == "tensor" else None
    for part in torch.split(weight, max(1, _CHUNK // max(columns, 1))):
        given, part = part, part.float()
        let_go_of_pages([given])
        digest.update(part.cpu().contiguous().numpy().tobytes())
        if not bool(part.isfinite().all()):
            raise InputError(f"{name} holds NaN or infinity: fix the model before you quantize it")
        part = part if smooth is None else part * smooth.to(part)
        codes, scale, zero = affine_rows(part, scheme, group, one_scale)
        held = pack_nibbles(codes) if scheme.bits == 4 else (codes.to(torch.int16) - 128).to(torch.int8)
        if values is None:
            values = held.new_empty(rows, held.shape[1])
        values[done : done + len(held)] = held
        done += len(held)
        scales.append(scale)
        zeros.append(zero)
    assert values is not None  # of no rows there is one part, of no rows
    return StoredWeight(
        values=values,
        scales=scales[0] if scheme.share == "tensor" else torch.cat(scales),
        zeros=torch.cat(zeros) if scheme.asymmetric else None,
        bits=scheme.bits,
        shape=(rows, columns),
        group=group,
        fingerprint=digest.hexdigest()[:16],
    )


def joined(parts: Iterable[StoredWeight], rows: int) -> StoredWeight:
    """Joins rows that are quantized one after another, with scales of their own.

    Args:
        parts: each is let go before the next is asked for.
        rows: of all of them.
    """
    whole: StoredWeight | None = None
    done = 0
    for part in parts:
        if part.shape[0] == rows:
            return part
        if whole is None:
            whole = replace(
                part,
                values=part.values.new_empty(rows, *part.values.shape[1:]),
                scales=part.scales.new_empty(rows, *part.scales.shape[1:]),
                zeros=None if part.zeros is None else part.zeros.new_empty(rows, *part.zeros.shape[1:]),
                shape=(rows, part.shape[1]),
            )
        at = slice(done, done + part.shape[0])
        whole.values[at], whole.scales[at] = part.values, part.scales
        if whole.zeros is not None and part.zeros is not None:
            whole.zeros[at] = part.zeros
        done = at.stop
    if whole is None or done != rows:
        raise ValueError(f"{done} of {rows} rows were given")
    return whole


def pack_nibbles(codes: Tensor) -> Tensor:
    """[n, K] codes below 16 -> [n, ceil(K/2)] bytes: the first half of the columns low, the second high."""
    half = -(-codes.shape[1] // 2)
    low, high = codes[:, :half], codes[:, half:]
    return low | (torch.nn.functional.pad(high, (0, half - high.shape[1])) << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The inverse of ``pack_nibbles``."""
    return torch.cat([packed & 15, packed >> 4], 1)[:, :columns]


def scale_format(scheme: Scheme) -> torch.dtype:
    """The format that scales are stored in."""
    return torch.bfloat16 if scheme.activations is None else torch.float32


def affine_rows(
    part: Tensor, scheme: Scheme, group: int, one_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n, K] uint8, scales [n, G] (or [1, 1]) in the stored format, zero points [n, G] uint8.

    Args:
        part: rows of a weight, [n, K], float32.
        scheme: how.
        group: columns that share a scale.
        one_scale: of the whole weight, where there is but one.
    """
    rows, columns = part.shape
    scale_dtype = scale_format(scheme)
    groups = -(-columns // group)
    grouped = torch.nn.functional.pad(part, (0, groups * group - columns)).view(rows, groups, group)
    codes, scale, zero = _affine(grouped, scheme, scale_dtype, 1.0, one_scale)
    if scheme.search:
        error = _squared_error(grouped, codes, scale, zero)
        for shrink in _SHRINK[1:]:
            other = _affine(grouped, scheme, scale_dtype, shrink, None)
            other_error = _squared_error(grouped, *other)
            better = other_error < error
            codes = torch.where(better[..., None], other[0], codes)
            scale, zero = torch.where(better, other[1], scale), torch.where(better, other[2], zero)
            error = torch.where(better, other_error, error)
    scale = scale if one_scale is None else scale[:1, :1]
    return codes.view(rows, -1)[:, :columns].contiguous(), scale, zero


def _affine(
    grouped: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: float, one_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of [n, G, g] and the scale and zero point of each group, its range shrunk by a factor."""
    top = 2**scheme.bits - 1
    middle = 2 ** (scheme.bits - 1)
    if scheme.asymmetric:
        low = grouped.amin(-1).clamp(max=0) * shrink
        high = grouped.amax(-1).clamp(min=0) * shrink
        scale = _usable((high - low) / top, scale_dtype)
        zero = (-low / scale.float()).round().clamp(0, top).to(torch.uint8)
        bottom = 0
    else:
        largest = grouped.abs().amax(-1) * shrink / (middle - 1 if scheme.activations is None else INT8_RANGE)
        scale = _usable(largest if one_scale is None else one_scale.expand_as(largest), scale_dtype)
        zero = torch.full_like(scale, middle, dtype=torch.uint8)
        bottom = 1
    codes = (grouped / scale.float()[..., None]).round() + zero[..., None]
    return codes.clamp(bottom, top).to(torch.uint8), scale, zero


def _usable(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in its stored format, rounded up; 1 where it is zero or too small to divide by."""
    scale = exact.to(dtype)
    if dtype == torch.bfloat16:
        # For positive numbers the next bit pattern is the next number.
        scale = torch.where(scale.float() < exact, (scale.view(torch.int16) + 1).view(dtype), scale)
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def _squared_error(grouped: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    restored = (codes.float() - zero.float()[..., None]) * scale.float()[..., None]
    return (restored - grouped).square().sum(-1)


def _largest(weight: Tensor, smooth: Tensor | None) -> Tensor:
    """max |W diag(s)|, a float32 scalar."""
    columns = weight.abs().amax(0).float()
    return (columns if smooth is None else columns * smooth.to(columns)).amax()

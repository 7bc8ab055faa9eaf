"""Schemes of small floating-point formats.

    WEIGHTS                     weights in that format, activations as they come        nvfp4, mxfp4, fp8-e4m3-row
    WEIGHTS/ACTIVATIONS         both, multiplied as floats                              fp8-e4m3-row/fp8-e4m3-row, nvfp4/nvfp4

The formats are those of ``stabilitylab.formats``: FP8 with a scale a tensor, a row (of activations: a token), a tile of 1 x 128 or
a block of 128 x 128; MXFP8, MXFP6, MXFP4; NVFP4 with its two levels of scales. Activation scales are taken at run time.

Limits: products are emulated: the layer multiplies the rounded numbers in the input's own format. So errors are those of the
format, and times are not those of a machine that has it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabilitylab.errors import InputError
from stabilitylab.formats import (
    Quantized,
    dequantize,
    fake_quantize,
    pack_4bit,
    quantize_rows,
    row_parts,
    scaled_format,
    some_rows,
    unpack_4bit,
)
from stabilitylab.models.freed_memory import let_go_of_pages
from stabilitylab.models.weight_checks import is_finite
from stabilitylab.quantization.weight_on_paper import HasWeightOnPaper

_SEARCHED = "-mse"
_AT_ONCE = 1 << 22  # numbers of a weight that are looked at together


@dataclass(frozen=True, kw_only=True)
class FormatScheme:
    """Weights, and perhaps activations, in a small floating-point format.

    Attributes:
        weights: name of the weights' format.
        activations: of the activations'; None leaves them as they are.
        search: whether scales of the weights are searched for the least squared error.
    """

    weights: str
    activations: str | None = None
    search: bool = False

    def __post_init__(self) -> None:
        for name in (self.weights, self.activations):
            if name is not None:
                scaled_format(name)

    @property
    def name(self) -> str:
        """``scheme_of`` reads it back."""
        weights = f"{self.weights}{_SEARCHED if self.search else ''}"
        return weights if self.activations is None else f"{weights}/{self.activations}"

    @classmethod
    def parse(cls, name: str) -> FormatScheme:
        """The scheme of that name. Raises InputError where a format is unknown."""
        weights, slash, activations = name.partition("/")
        return cls(
            weights=weights.removesuffix(_SEARCHED),
            activations=activations if slash else None,
            search=weights.endswith(_SEARCHED),
        )

    def layer(
        self,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        largest: Tensor | None = None,
        name: str = "the layer",
    ) -> FormatLinear:
        """A linear layer of W [N, K] in this scheme. Raises InputError where a weight is not finite."""
        if not is_finite(weight):
            raise InputError(f"{name} holds NaN or infinity: fix the model before you quantize it")
        stored = self.quantize(weight.detach())
        return FormatLinear(stored, self, bias=bias, fingerprint=fingerprint_of_weight(weight))

    def quantize(self, weight: Tensor) -> Quantized:
        """W in the weights' format."""
        return quantize_rows(
            weight, self.weights, search=self.search, seen=lambda part: let_go_of_pages([part])
        )


def fingerprint_of_weight(weight: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a weight in float32."""
    digest = hashlib.sha256()
    for part in torch.split(weight.detach(), max(1, _AT_ONCE // max(1, weight.shape[-1]))):
        digest.update(part.float().cpu().contiguous().numpy().tobytes())
        let_go_of_pages([part])
    return digest.hexdigest()[:16]


class FormatLinear(HasWeightOnPaper, nn.Module):
    """y = x^ W^' + b, with the weights stored as codes and scales.

    Args:
        stored: the weights, [N, K].
        scheme: says whether activations are rounded too.
        bias: [N], or None.
        smooth: [K], factors already in the weights' columns, by which x is divided; or None.
        fingerprint: of the float32 weights that the layer was made from.
        columns: K, where 4-bit codes are already packed two to a byte; None: each has its own byte.
    """

    codes: Tensor
    scales: Tensor | None
    tensor_scale: Tensor | None
    bias: Tensor | None
    smooth: Tensor | None

    def __init__(
        self,
        stored: Quantized,
        scheme: FormatScheme,
        *,
        bias: Tensor | None = None,
        smooth: Tensor | None = None,
        fingerprint: str = "",
        columns: int | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.format = stored.format
        self.out_features = len(stored.codes)
        self.in_features = stored.codes.shape[1] if columns is None else columns
        self.group, self.fingerprint = 0, fingerprint
        whole = stored.codes.shape[1] == self.in_features
        packs = self.format.element.bits == 4 and self.in_features % 2 == 0 and whole
        self.register_buffer("codes", pack_4bit(stored.codes) if packs else stored.codes)
        self.register_buffer("scales", stored.scales)
        self.register_buffer("tensor_scale", stored.tensor_scale)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("smooth", None if smooth is None else smooth.detach().float())
        self.register_buffer("computes", torch.empty(0, device=stored.codes.device), persistent=False)
        self.eval()

    @property
    def stored(self) -> Quantized:
        """Codes, a byte each, and scales."""
        packed = self.codes.shape[1] != self.in_features
        return replace(self._held, codes=unpack_4bit(self.codes)) if packed else self._held

    def beside(self, bias: Tensor | None) -> FormatLinear:
        """Another layer of the same numbers, not copied."""
        return FormatLinear(
            self._held, self.scheme, bias=bias, fingerprint=self.fingerprint, columns=self.in_features
        )

    @property
    def _held(self) -> Quantized:
        """Codes as they lie here, and scales."""
        return Quantized(
            codes=self.codes, scales=self.scales, tensor_scale=self.tensor_scale, format=self.format
        )

    def rows(self, rows: slice | Tensor) -> Quantized:
        """Some rows, as ``some_rows`` takes them."""
        packed = self.codes.shape[1] != self.in_features
        found = some_rows(self._held, rows)
        return replace(found, codes=unpack_4bit(found.codes)) if packed else found

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights, without the bias; codes of 6 bits count 6, though a byte holds one here."""
        held = -(-self.out_features * self.in_features * self.format.element.bits // 8)
        return held + sum(
            t.numel() * t.element_size()
            for t in (self.scales, self.tensor_scale, self.smooth)
            if t is not None
        )

    def prepare(self) -> None:
        """Nothing: there is no kernel of another layout."""

    def release(self) -> None:
        """Nothing, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, in the input's format.

        Args:
            x: [..., K], floating.

        Raises:
            RuntimeError: the input asks for a gradient, which rounding does not have.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a quantized layer has no gradient: call the model under torch.no_grad()")
        given = x.dtype
        x = x if self.smooth is None else x.float() / self.smooth
        rounded = (
            x if self.scheme.activations is None else fake_quantize(x, self.scheme.activations).to(x.dtype)
        )
        bias = None if self.bias is None else self.bias.to(x.dtype)
        parts = list(row_parts(self.out_features, self.in_features, self.format))
        if len(parts) == 1:
            return F.linear(rounded, dequantize(self.stored).to(x.dtype), bias).to(given)
        y = rounded.new_empty(*rounded.shape[:-1], self.out_features)
        for rows in parts:
            weight = dequantize(self.rows(rows)).to(x.dtype)
            y[..., rows] = F.linear(rounded, weight, None if bias is None else bias[rows])
            let_go_of_pages([self.codes[rows]])
        return y.to(given)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme.name}"

    def _apply(self, fn: Any, recurse: bool = True) -> FormatLinear:
        # A move takes everything along; a change of format is for the bias alone (codes and scales keep theirs).
        kept = {name: getattr(self, name) for name in ("codes", "scales", "tensor_scale", "smooth")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            if before is not None:
                setattr(self, name, before.to(getattr(self, name).device))
        return self

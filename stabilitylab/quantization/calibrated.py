"""Schemes that round weights for the inputs that a layer sees, instead of each number to its nearest.

    SCHEME-gptq         columns take over each other's errors, in the order in which they stand      gptq.py
    SCHEME-gptqo        the same, columns of large activations first ("act-order")                    gptq.py
    SCHEME-awq          channels scaled up before rounding where their activations are large         awq.py

SCHEME is any of this package with scales of its own for groups, rows or blocks: int4-g64-asym-mse, w8a8-token, nvfp4, mxfp4, ....
The stored form is SCHEME's (AWQ adds a factor a channel), so kernels, files and exports know it already. Beside the weight, these
schemes need the moments of its input (input_moments.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.formats import dequantize, row_parts, some_rows
from stabilitylab.models.freed_memory import give_back_memory, let_go_of_pages
from stabilitylab.models.weight_checks import is_finite
from stabilitylab.quantization.awq import awq_scales
from stabilitylab.quantization.format_scheme import FormatLinear, FormatScheme, fingerprint_of_weight
from stabilitylab.quantization.gptq import gptq
from stabilitylab.quantization.gptq_factors import Factor
from stabilitylab.quantization.grids import FormatGrid, IntegerGrid
from stabilitylab.quantization.input_moments import Moments
from stabilitylab.quantization.linear import QuantizedLinear
from stabilitylab.quantization.scheme import Scheme
from stabilitylab.quantization.stored_weight import StoredWeight, joined, quantize_weight

Method = Literal["gptq", "gptqo", "awq"]
_WHOLE = 1 << 25  # weights of up to this many numbers are rounded whole; larger ones
_AT_ONCE = 1 << 22  # in parts of this many numbers, of which a dozen fp32 copies come and go
METHODS: tuple[Method, ...] = ("gptq", "gptqo", "awq")


@dataclass(frozen=True, kw_only=True)
class CalibratedScheme:
    """A scheme that rounds weights for their inputs.

    Attributes:
        inner: says which numbers weights can become, and what becomes of activations.
        method: how they are rounded.
    """

    inner: Scheme | FormatScheme
    method: Method

    def __post_init__(self) -> None:
        if isinstance(self.inner, Scheme) and self.inner.smooth is not None:
            raise InputError(
                f"{self.name}: SmoothQuant scales the channels already; choose another scheme to round"
            )
        if self.method != "awq" and isinstance(self.inner, Scheme) and self.inner.share == "tensor":
            raise InputError(
                f"{self.name}: with one scale a tensor there is nothing to gain; choose a scale a row"
            )

    @property
    def name(self) -> str:
        """``scheme_of`` reads it back."""
        return f"{self.inner.name}-{self.method}"

    def layer(
        self,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        largest: Tensor | None = None,
        name: str = "the layer",
        moments: Moments | None = None,
    ) -> QuantizedLinear | FormatLinear:
        """A linear layer of W [N, K] in this scheme.

        Args:
            weight, bias: of the layer.
            largest: not used.
            name: how errors call it.
            moments: of its input.

        Raises:
            InputError: there are no moments, or a weight is not finite.
        """
        if moments is None:
            raise InputError(
                f"{name}: {self.name} rounds for a text's inputs: make the plan again with --text, or keep the file of rounded "
                "weights beside it"
            )
        weight = weight.detach()
        if not is_finite(weight):
            raise InputError(f"{name} holds NaN or infinity: fix the model before you quantize it")
        if self.method == "awq":
            return self._scaled(weight, bias, moments, name)
        factor = moments.factor(order=self.method == "gptqo")
        mark = fingerprint_of_weight(weight)
        if isinstance(self.inner, Scheme):
            stored = joined(self._rounded_rows(weight, self.inner, factor, mark), len(weight))
            return QuantizedLinear(stored, self.inner, bias=bias)
        usual = self.inner.quantize(weight)
        # These are the codes of rounding to nearest, with the scales; each part's new codes take their place.
        for rows in row_parts(weight.shape[0], weight.shape[1], usual.format):
            places = FormatGrid(some_rows(usual, rows))
            usual.codes[rows] = places.stored(gptq(weight[rows], factor, places)).codes
            let_go_of_pages([weight[rows]])
        return FormatLinear(usual, self.inner, bias=bias, fingerprint=mark)

    @staticmethod
    def _rounded_rows(weight: Tensor, inner: Scheme, factor: Factor, mark: str) -> Iterator[StoredWeight]:
        """Rounds rows, which do not depend on each other: GPTQ holds some rows of a vocabulary's matrix at a time, in fp32."""
        rows = len(weight) if weight.numel() <= _WHOLE else max(1, _AT_ONCE // weight.shape[1])
        for part in torch.split(weight, max(1, rows)):
            grid = IntegerGrid(inner, (part.shape[0], part.shape[1]))
            yield grid.stored(gptq(part, factor, grid), mark)
            let_go_of_pages([part])
            if rows < len(weight):
                give_back_memory()

    def _scaled(
        self, weight: Tensor, bias: Tensor | None, moments: Moments, name: str
    ) -> QuantizedLinear | FormatLinear:
        inner = self.inner
        if isinstance(inner, Scheme):
            scales_K = awq_scales(
                weight, moments, lambda part: quantize_weight(part, inner, name=name).dequantize()
            )
            stored = quantize_weight(weight, inner, smooth=scales_K, name=name)
            return QuantizedLinear(stored, inner, bias=bias, smooth=scales_K)
        scales_K = awq_scales(weight, moments, lambda part: dequantize(inner.quantize(part)))
        return FormatLinear(
            inner.quantize(weight.float() * scales_K),
            inner,
            bias=bias,
            smooth=scales_K,
            fingerprint=fingerprint_of_weight(weight),
        )


def needs_moments(scheme: Any) -> bool:
    """Whether this scheme makes a layer for its inputs."""
    return isinstance(getattr(scheme, "inner", scheme), CalibratedScheme) or isinstance(
        scheme, CalibratedScheme
    )

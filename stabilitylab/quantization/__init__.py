"""Schemes of quantization, linear layers that follow them, and what each costs a model."""

from stabilitylab.quantization.linear import QuantizedLinear
from stabilitylab.quantization.reference import reference_linear
from stabilitylab.quantization.scheme import Scheme
from stabilitylab.quantization.stored import StoredWeight, quantize_weight

__all__ = ["QuantizedLinear", "Scheme", "StoredWeight", "quantize_weight", "reference_linear"]

"""Quantization schemes, linear layers that follow them, what each costs a model, and plans that choose among them."""

from stabilitylab.quantization.linear import QuantizedLinear
from stabilitylab.quantization.reference import reference_linear
from stabilitylab.quantization.scheme import Scheme
from stabilitylab.quantization.stored_weight import StoredWeight, quantize_weight

__all__ = ["QuantizedLinear", "Scheme", "StoredWeight", "quantize_weight", "reference_linear"]

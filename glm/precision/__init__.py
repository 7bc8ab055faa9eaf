"""Number formats: which tensor has which, how to multiply operands in half precision, and how to scale the loss."""

from glm.precision.gate import gated_heads
from glm.precision.gradient_range import GradientRange, count_all, gradient_range
from glm.precision.half_units import multiplies_natively, upcasts
from glm.precision.kernel import attention, gated_gelu, has_kernel, losses
from glm.precision.loss_scale import LossScaleConfig, LossScaler
from glm.precision.matmul import (
    at_least_fp32,
    attention_scores,
    fused_attention,
    linear,
    matmul,
    softmax_matmul,
    wide_product,
    wide_product_of_rows,
)
from glm.precision.policy import Precision, PrecisionPolicy
from glm.precision.recomputed import with_recipe
from glm.precision.rms import rms_norm

__all__ = [
    "GradientRange",
    "LossScaleConfig",
    "LossScaler",
    "Precision",
    "PrecisionPolicy",
    "at_least_fp32",
    "attention",
    "attention_scores",
    "count_all",
    "fused_attention",
    "gated_gelu",
    "gated_heads",
    "gradient_range",
    "has_kernel",
    "linear",
    "losses",
    "matmul",
    "multiplies_natively",
    "rms_norm",
    "softmax_matmul",
    "upcasts",
    "wide_product",
    "wide_product_of_rows",
    "with_recipe",
]

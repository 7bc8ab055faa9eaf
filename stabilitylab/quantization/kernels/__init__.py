"""Which native operation multiplies with quantized weights, on this machine, for this many rows.

A kernel takes the canonical form (stored_weight.py) into whatever layout it wants and can give it back. Dispatch uses it only where
a small problem, made to break it, has shown in this process that it agrees with the reference: depending on processor, device and
version of torch, kernels saturate, want shapes, or are missing. A rule on capabilities, not a stopwatch, decides which kernel runs
and from how many rows on, so that the same machine gives the same numbers every time.
"""

from stabilitylab.quantization.kernels.dispatch import (
    IntegerKernel,
    WeightKernel,
    integer_kernel,
    weight_kernel,
)

__all__ = ["IntegerKernel", "WeightKernel", "integer_kernel", "weight_kernel"]

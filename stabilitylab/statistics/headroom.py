"""Room left in a number format.

Headroom in bits is ``log2(limit / max|x|)``: how many more doublings fit before overflow. Zero at the limit, negative beyond it,
infinite for an all-zero tensor, NaN where the maximum is NaN.

Limits: IEEE 754 binary16 and bfloat16; FP8 E4M3 and E5M2 as in Micikevicius et al., "FP8 formats for deep learning"
(arXiv:2209.05433), table 1 (E4M3 in its finite-only variant, largest value 448).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FP16_MAX = 65504.0
FP8_E4M3_MAX = 448.0
FP8_E5M2_MAX = 57344.0


def headroom_bits(absmax: ArrayLike, limit: float = FP16_MAX) -> NDArray[np.float64]:
    """``log2(limit / absmax)``, elementwise, in bits.

    Args:
        absmax: largest magnitudes, >= 0; NaN stays NaN.
        limit: the format's largest finite value.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log2(limit) - np.log2(np.asarray(absmax, dtype=np.float64)))

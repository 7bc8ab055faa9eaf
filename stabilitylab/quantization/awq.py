"""AWQ scales channels with large activations up before rounding, so that their weights are rounded more finely.

    y = (W diag(s)) (x / s),    s_k = (mean |x_k|)^a,  divided by sqrt(max s * min s),    a in {0, .1, ..., 1}

The search takes the exponent with the least output error tr(D S D'), D = round(W diag(s)) diag(1 / s) - W (Lin et al.,
arXiv:2306.00978, section 3.2). a = 0 leaves the layer as it is, so by that measure nothing is lost. The original folds 1 / s into
the layer before; the layer here divides its input.

The search looks at no more than some rows of W: the error is a sum over rows, and only one exponent is to be found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stabilitylab.quantization.input_moments import Moments

_STEPS = 10
_ROWS = 256


def awq_scales(weight_NK: Tensor, moments: Moments, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """s, [K]; all ones where scaling does not help.

    Args:
        weight_NK: the weight.
        moments: of the layer's input.
        rounded: rounds a weight.
    """
    weight_nK = weight_NK.detach().float()
    if len(weight_nK) > _ROWS:
        weight_nK = weight_nK[:: -(-len(weight_nK) // _ROWS)]
    best_K = torch.ones(weight_NK.shape[1])
    least = moments.output_error(rounded(weight_nK) - weight_nK)
    size_K = moments.mean.float()
    used_K = size_K > 0
    if not bool(used_K.any()):
        return best_K
    for step in range(1, _STEPS + 1):
        scale_K = torch.where(used_K, size_K, 1.0) ** (step / _STEPS)
        middle = (scale_K[used_K].max() * scale_K[used_K].min()).sqrt()
        scale_K = torch.where(used_K, scale_K / middle, 1.0)
        if not bool((scale_K.isfinite() & (scale_K > 0)).all()):
            continue
        error = moments.output_error(rounded(weight_nK * scale_K) / scale_K - weight_nK)
        if error < least:
            least, best_K = error, scale_K
    return best_K

"""What each scheme computes, in plain float64: the oracle of every kernel.

    y = x_q W_q' + b,    x_q the activations after rounding (scheme.py), W_q the stored weights (stored_weight.py)

Which integer an activation becomes is decided in float32, as in every layer here: in another format a value next to the middle
between two integers may fall to the other side.

Nothing here is fast, and only tests and the self-checks of kernels call it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabilitylab.quantization.scheme import INT8_RANGE, Scheme
from stabilitylab.quantization.stored_weight import StoredWeight


def reference_linear(
    x: Tensor,
    stored: StoredWeight,
    scheme: Scheme,
    *,
    smooth: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The layer's output in float64.

    Args:
        x: [..., K].
        stored: the quantized weights; those of W diag(smooth) where ``smooth`` is given.
        scheme: how the activations are rounded.
        smooth: [K].
        bias: [N].
    """
    rows = x.reshape(-1, stored.shape[1])
    if smooth is not None:
        rows = rows.float() / smooth
    rounded = rows.double() if scheme.activations is None else reference_activations(rows.float(), scheme)
    y = rounded @ stored.dequantize(torch.float64).T
    if bias is not None:
        y = y + bias.double()
    return y.view(*x.shape[:-1], stored.shape[0])


def reference_activations(rows: Tensor, scheme: Scheme) -> Tensor:
    """float32 activations [M, K] after int8 and back: s = max|x| / 127.5 over tensor or token, round(x / s) s. float64."""
    kept = torch.zeros(rows.shape[1], dtype=torch.bool)
    if scheme.threshold is not None:
        kept = (rows.abs() >= scheme.threshold).any(0)
    regular = rows.masked_fill(kept, 0.0)
    largest = regular.abs().amax(-1, keepdim=True) if scheme.activations == "token" else regular.abs().amax()
    scale = torch.where(largest == 0, 1.0, largest / INT8_RANGE)
    return torch.where(
        kept, rows.double(), (regular / scale).round().clamp(-127, 127).double() * scale.double()
    )

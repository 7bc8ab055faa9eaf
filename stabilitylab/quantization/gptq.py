"""GPTQ rounds columns one after another, and those still to come take over what each was off by.

For W [N, K] and inputs of second moment S, for k = 1 ... K, with q(.) rounding to the grid and U' U = (S + damping)^-1:

    Q[:, k] = q(W[:, k])        e = (W[:, k] - Q[:, k]) / U[k, k]        W[:, j] -= e U[k, j]  for j > k

This is the optimal brain surgeon's step for each row, so that tr((W - Q) S (W - Q)') is less than by rounding to nearest (Frantar
et al., arXiv:2210.17323, algorithm 1). Columns may come in order of S[k, k], largest first ("act-order"): those that matter most
are then rounded while most freedom is left.

A scale that columns share is taken from the weights as they are when the first of its columns is reached. In another order a
group's columns come scattered, and the scale is taken from the weights as they were.

GPTQ works on columns in blocks, and applies changes to the columns after a block at once. W is held transposed, so that a column is
contiguous.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from stabilitylab.quantization.gptq_factors import Factor

_BLOCK = 128


class Grid(Protocol):
    """The numbers that a weight can become, column by column."""

    @property
    def group(self) -> int:
        """Columns that share a scale."""

    def open(self, start: int, part_Ng: Tensor) -> None:
        """Take the scales of the columns from ``start`` on from these weights."""

    def round(self, column_N: Tensor, k: int) -> Tensor:
        """A column's nearest numbers on the grid."""


def gptq(weight_NK: Tensor, factor: Factor, grid: Grid) -> Tensor:
    """The rounded weight, [N, K], each number on the grid.

    Args:
        weight_NK: any floating format.
        factor: of the input's second moment (``Moments.factor``).
        grid: opened for every column on return.
    """
    at_K = factor.order
    # A copy in any case: for a transposed view (Conv1D's weight) ``contiguous`` would give the model's own numbers.
    left_KN = weight_NK.detach().to(factor.dtype).T.clone(memory_format=torch.contiguous_format)
    columns = len(left_KN)
    ordered = bool((at_K == torch.arange(columns)).all())
    if not ordered:
        for start in range(0, columns, grid.group):
            grid.open(start, left_KN[start : start + grid.group].T)
        left_KN = left_KN[at_K]
    rounded_KN = torch.empty_like(left_KN)
    places = at_K.tolist()
    for first, last, upper_bK in factor.blocks(_BLOCK):
        size = last - first
        errors_kN = torch.empty_like(left_KN[first:last])
        for k in range(first, last):
            if ordered and k % grid.group == 0:
                # Where a group reaches beyond the block, its rest lacks what this block has changed so far.
                end = min(k + grid.group, columns)
                part_gN = left_KN[k:end].clone()
                if end > last:
                    part_gN[last - k :] -= (
                        upper_bK[: k - first, size : end - first].T @ errors_kN[: k - first]
                    )
                grid.open(k, part_gN.T)
            rounded_KN[k] = grid.round(left_KN[k], places[k])
            own_b = upper_bK[k - first]
            error_N = (left_KN[k] - rounded_KN[k]) / own_b[k - first]
            errors_kN[k - first] = error_N
            if k + 1 < last:
                left_KN[k + 1 : last].addr_(own_b[k + 1 - first : size], error_N, alpha=-1)
        if last < columns:
            left_KN[last:].addmm_(upper_bK[:, size:].T, errors_kN, alpha=-1)
    if not ordered:
        back_KN = torch.empty_like(rounded_KN)
        back_KN[at_K] = rounded_KN
        rounded_KN = back_KN
    return rounded_KN.T.contiguous()

"""What GPTQ needs of its inputs: rows of U, upper triangular, with U' U = A^-1 for A = (1 - r) S + diag(r S) + damping, in blocks.

A whole U takes K K numbers and three factorizations. Fewer rows than columns have entered most layers of a large model (K = 8,192
behind a feed-forward block), and then A is a diagonal and a matrix of rank T,

    A = Y' Y + diag(d)        Y = X sqrt((1 - r) / T)  [T, K]

so that by Woodbury's identity, for the trailing part of A from column a on and M_a = 1 + sum over k >= a of y_k y_k' / d_k  [T, T],

    (A_a)^-1 = diag(1 / d) - diag(1 / d) Y' (M_a)^-1 Y diag(1 / d)

The rows of U that belong to a block of columns B at the head of that part come from the inverse's first rows Z_B,: alone,

    U_BB' U_BB = Z_BB        U_BB' U_BR = Z_BR

in K T (T + K) operations and T K numbers in all, instead of K K K and several times K K.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

ColumnBlock = tuple[int, int, Tensor]  # first and last column + 1; rows of U, from their first column on


class Factor(Protocol):
    """U, for columns in some order."""

    @property
    def order(self) -> Tensor:
        """Numbers of the columns, [K]."""

    @property
    def dtype(self) -> torch.dtype:
        """The format of U."""

    def blocks(self, size: int) -> Iterator[ColumnBlock]:
        """Blocks of ``size`` rows, one after another."""


class WholeFactor:
    """U as it is.

    Args:
        order: see ``Factor``.
        upper_KK: U.
    """

    def __init__(self, order: Tensor, upper_KK: Tensor) -> None:
        self.order, self.dtype, self._upper_KK = order, upper_KK.dtype, upper_KK

    def blocks(self, size: int) -> Iterator[ColumnBlock]:
        columns = len(self._upper_KK)
        for first in range(0, columns, size):
            last = min(first + size, columns)
            yield first, last, self._upper_KK[first:last, first:]


class RowsFactor:
    """U from fewer rows than columns.

    Args:
        order: see ``Factor``.
        y_TK: Y, its columns in that order.
        d_K: d, likewise; positive.
    """

    def __init__(self, order: Tensor, y_TK: Tensor, d_K: Tensor) -> None:
        self.order, self.dtype = order, y_TK.dtype
        self._y_TK, self._d_K = y_TK, d_K.double()

    def blocks(self, size: int) -> Iterator[ColumnBlock]:
        y_TK, d_K, columns = self._y_TK, self._d_K, len(self._d_K)
        m_TT = torch.eye(len(y_TK), dtype=torch.float64)
        for first in range(0, columns, size):
            part = slice(first, first + size)
            y_TB = y_TK[:, part].double()
            m_TT.addmm_(y_TB / d_K[part], y_TB.T)
        for first in range(0, columns, size):
            last = min(first + size, columns)
            y_TB, d_B = y_TK[:, first:last].double(), d_K[first:last]
            scaled_TB = y_TB / d_B
            solved_TB = torch.cholesky_solve(scaled_TB, torch.linalg.cholesky(m_TT))
            head_BB = torch.diag(1 / d_B) - scaled_TB.T @ solved_TB
            upper_BB = torch.linalg.cholesky(head_BB, upper=True)
            rows = y_TK.new_empty(last - first, columns - first)
            rows[:, : last - first] = upper_BB.to(rows)
            if last < columns:
                # The narrow factors first, so that one product alone is wide.
                left_BT = torch.linalg.solve_triangular(upper_BB.T, solved_TB.T, upper=False).neg_().to(rows)
                rows[:, last - first :] = (left_BT @ y_TK[:, last:]).div_(d_K[last:].to(rows))
            yield first, last, rows
            m_TT.addmm_(scaled_TB, y_TB.T, alpha=-1)

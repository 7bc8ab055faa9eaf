"""Statistics of a text's rows as they entered a layer: from them weights are rounded for that text.

    second    S = sum_t x_t x_t' / T    [K, K]; a changed weight W + D changes the output by sum_t |D x_t|^2 / T = tr(D S D')
    mean      sum_t |x_t| / T           [K], of each channel

S is half the Hessian of the squared output error with regard to each row of W (GPTQ, arXiv:2210.17323, section 3).

Channels of the few tokens of one text correlate more than those of other texts will, and rounding that relies on it is rounding for
that text. So GPTQ gets S with correlations shrunk,

    S[j, k] (1 - r)  for j other than k,    r = 4 K / (4 K + T)

as if four tokens of running text were worth one that is drawn alone. Source of the form: Ledoit and Wolf (2004), a well-conditioned
estimator for large-dimensional covariance matrices; the four was measured on SmolLM2-135M (experiments/RESULTS.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabilitylab.formats import rotate
from stabilitylab.quantization.gptq_factors import Factor, RowsFactor, WholeFactor

_DAMPING = 0.01  # GPTQ's: a share of the mean of the diagonal, added to it
_WORTH_ONE = 4.0  # tokens of running text that are worth one drawn alone


class Moments:
    """Running sums over the rows that entered a layer.

    Args:
        columns: K.
        dtype: of the sums.
    """

    def __init__(self, columns: int, dtype: torch.dtype = torch.float32) -> None:
        self.count = 0
        # Fewer rows than columns are kept as they are: S would be larger.
        self._rows: list[Tensor] = []
        self._sum_KK: Tensor | None = None
        self._size_K = torch.zeros(columns, dtype=dtype)
        self._factors: dict[bool, Factor] = {}

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype = torch.float32) -> Moments:
        """The moments of rows x [..., K]."""
        made = cls(x.shape[-1], dtype)
        made.add(x)
        return made

    def add(self, x: Tensor) -> None:
        """Add rows [..., K]."""
        x_MK = x.detach().reshape(-1, x.shape[-1]).to(self._size_K)
        self.count += len(x_MK)
        self._size_K += x_MK.abs().sum(0)
        self._factors.clear()
        if self._sum_KK is not None:
            self._sum_KK.addmm_(x_MK.T, x_MK)
            return
        self._rows.append(x_MK.clone())
        if self.count >= len(self._size_K):
            self._sum_KK = self._summed()
            self._rows.clear()

    def _summed(self) -> Tensor:
        """S T, a copy."""
        if self._sum_KK is not None:
            return self._sum_KK.clone()
        columns = len(self._size_K)
        found = torch.zeros(columns, columns, dtype=self._size_K.dtype)
        for x_MK in self._rows:
            found.addmm_(x_MK.T, x_MK)
        return found

    @property
    def second(self) -> Tensor:
        """S, [K, K]."""
        return self._summed().div_(max(self.count, 1))

    @property
    def mean(self) -> Tensor:
        """Mean of |x|, [K]."""
        return self._size_K / max(self.count, 1)

    def rotated(self, signs: Tensor) -> Moments:
        """The moments of x R: S becomes R' S R; |x| is taken to be that of Gaussian channels, which a rotation makes of any."""
        made = Moments(len(self._size_K), self._size_K.dtype)
        made.count = self.count
        made._sum_KK = rotate(rotate(self._summed(), signs).T.contiguous(), signs)
        variance_K = made._sum_KK.diagonal().clamp(min=0) / max(self.count, 1)
        made._size_K = (variance_K * 2 / torch.pi).sqrt() * self.count
        return made

    def output_error(self, off_NK: Tensor) -> Tensor:
        """tr(D S D'): the mean squared error of the output, summed over its channels, for a weight that is off by D."""
        off = off_NK.to(self._size_K)
        if self._sum_KK is None:
            return sum(((off @ x_MK.T).square().sum() for x_MK in self._rows), off.new_zeros(())) / max(
                self.count, 1
            )
        return (off @ self.second * off).sum()

    def factor(self, *, order: bool) -> Factor:
        """U with U' U = (S + damping)^-1, correlations shrunk, for columns in some order.

        Layers with one input share their moments, so a factor once made is kept.

        Args:
            order: columns of large S[k, k] first; otherwise in their own order.
        """
        if order not in self._factors:
            self._factors[order] = self._factored(order)
        return self._factors[order]

    def _factored(self, order: bool) -> Factor:
        columns = len(self._size_K)
        kept = self.count / (_WORTH_ONE * columns + self.count)  # 1 - r
        if self._sum_KK is not None or not self.count:
            return self._of_the_sum(order, kept)
        square_K = torch.zeros_like(self._size_K)
        for x_MK in self._rows:
            square_K += x_MK.square().sum(0)
        diagonal_K, at_K = _ordered(square_K / self.count, order)
        own_K = torch.where(square_K[at_K] == 0, 1.0, (1 - kept) * diagonal_K)
        own_K += _DAMPING * float(diagonal_K.mean())
        y_TK = torch.cat(self._rows)[:, at_K].mul_((kept / self.count) ** 0.5)
        return RowsFactor(at_K, y_TK, own_K)

    def _of_the_sum(self, order: bool, kept: float) -> Factor:
        second = self.second
        diagonal_K, at_K = _ordered(second.diagonal(), order)
        second = second.mul_(kept)[at_K[:, None], at_K]
        second.diagonal().copy_(diagonal_K)
        damping = _DAMPING * float(diagonal_K.mean())
        while True:
            second.diagonal().add_(damping)
            upper, failed = torch.linalg.cholesky_ex(second)
            if not failed:
                upper = torch.cholesky_inverse(upper)  # under one name: each is as large as S
                upper, failed = torch.linalg.cholesky_ex(upper, upper=True)
                if not failed:
                    return WholeFactor(at_K, upper)
            damping *= 10


def _ordered(diagonal_K: Tensor, order: bool) -> tuple[Tensor, Tensor]:
    """S[k, k] and the columns' numbers in the order in which they are rounded. A channel that the text never used counts 1: it is
    rounded to nearest, and nothing else changes for its sake."""
    diagonal_K = torch.where(diagonal_K == 0, 1.0, diagonal_K)
    at_K = torch.argsort(diagonal_K, descending=True, stable=True) if order else torch.arange(len(diagonal_K))
    return diagonal_K[at_K], at_K

"""What a text's rows were as they entered a layer: the statistics from which weights are rounded for that text.

    second    S = sum_t x_t x_t' / T    [K, K]; a changed weight W + D changes the output by sum_t |D x_t|^2 / T = tr(D S D')
    mean      sum_t |x_t| / T           [K], of each channel

S is half the Hessian of the squared output error with regard to each row of W (GPTQ, arXiv:2210.17323, section 3).

Channels of the few tokens of one text go together more than those of other texts will, and rounding that relies on it is
rounding for that text. So GPTQ is given S with correlations shrunk,

    S[j, k] (1 - r)  for j other than k,    r = 4 K / (4 K + T)

as if four tokens of running text were worth one that is drawn alone. Source of the form: Ledoit and Wolf (2004), a well-conditioned
estimator for large-dimensional covariance matrices; the four is measured on SmolLM2-135M (experiments/RESULTS.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabilitylab.formats import rotate

_DAMPING = 0.01  # GPTQ's: a share of the mean of the diagonal, added to it
_WORTH_ONE = 4.0  # tokens of running text, of one that is drawn alone


class Moments:
    """Running sums over the rows that entered a layer.

    Args:
        columns: K.
        dtype: of the sums.
    """

    def __init__(self, columns: int, dtype: torch.dtype = torch.float32) -> None:
        self.count = 0
        self._second_KK = torch.zeros(columns, columns, dtype=dtype)
        self._size_K = torch.zeros(columns, dtype=dtype)
        self._factors: dict[bool, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype = torch.float32) -> Moments:
        """Of rows x [..., K]."""
        made = cls(x.shape[-1], dtype)
        made.add(x)
        return made

    def add(self, x: Tensor) -> None:
        """Add rows [..., K]."""
        x_MK = x.detach().reshape(-1, x.shape[-1]).to(self._second_KK)
        self.count += len(x_MK)
        self._second_KK.addmm_(x_MK.T, x_MK)
        self._size_K += x_MK.abs().sum(0)
        self._factors.clear()

    @property
    def second(self) -> Tensor:
        """S, [K, K]."""
        return self._second_KK / max(self.count, 1)

    @property
    def mean(self) -> Tensor:
        """Of |x|, [K]."""
        return self._size_K / max(self.count, 1)

    def rotated(self, signs: Tensor) -> Moments:
        """Of x R: S becomes R' S R; |x| is taken to be that of Gaussian channels, which a rotation makes of any."""
        made = Moments(len(self._size_K), self._second_KK.dtype)
        made.count = self.count
        made._second_KK = rotate(rotate(self._second_KK, signs).T.contiguous(), signs)
        variance_K = made._second_KK.diagonal().clamp(min=0) / max(self.count, 1)
        made._size_K = (variance_K * 2 / torch.pi).sqrt() * self.count
        return made

    def output_error(self, off_NK: Tensor) -> Tensor:
        """tr(D S D'): the mean squared error of the output, summed over its channels, of a weight that is off by D."""
        off = off_NK.to(self._second_KK)
        return (off @ self.second * off).sum()

    def factor(self, *, order: bool) -> tuple[Tensor, Tensor]:
        """The order of the columns [K] and U [K, K], upper triangular, with U' U = (S + damping)^-1 in that order.

        Layers with one input share their moments, so what was factored once is kept.

        Args:
            order: columns of large S[k, k] first; otherwise as they stand.
        """
        if order not in self._factors:
            self._factors[order] = self._factored(order)
        return self._factors[order]

    def _factored(self, order: bool) -> tuple[Tensor, Tensor]:
        second = self.second
        # A channel that the text never used is rounded to nearest, and nothing else is changed for its sake.
        diagonal = second.diagonal()
        diagonal.masked_fill_(diagonal == 0, 1.0)
        kept_K, columns = diagonal.clone(), _WORTH_ONE * len(second)
        second.mul_(self.count / (columns + self.count)).diagonal().copy_(kept_K)
        at_K = torch.argsort(diagonal, descending=True, stable=True) if order else torch.arange(len(second))
        second = second[at_K][:, at_K]
        damping = _DAMPING * float(second.diagonal().mean())
        while True:
            second.diagonal().add_(damping)
            lower, failed = torch.linalg.cholesky_ex(second)
            if not failed:
                inverse = torch.cholesky_inverse(lower)
                upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
                if not failed:
                    return at_K, upper
            damping *= 10

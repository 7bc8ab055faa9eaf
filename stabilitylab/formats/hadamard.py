"""A random Hadamard rotation spreads outliers over their block before it is rounded.

    y = x D H / sqrt(n) in every block of n numbers of the last dimension,    D = diag(signs),  H[i, j] = (-1)^popcount(i & j)

D H / sqrt(n) is orthogonal, so (x R)(w R)' = x w': a product whose two operands are rotated along the summed dimension is the same
but for rounding. NVIDIA's FP4 recipe (2509.25149, section 4.2) takes n = 16 and one vector of signs, and rotates the operands of
the weight gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabilitylab.errors import InputError


def rotation_signs(size: int, seed: int) -> Tensor:
    """[n] of -1 and 1, a function of the seed. Raises InputError where n is not a power of two."""
    if size < 1 or size & (size - 1):
        raise InputError(f"a Hadamard matrix of {size} rows is not built here: choose a power of two")
    drawn = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed))
    return drawn.float() * 2 - 1


def hadamard_matrix(size: int) -> Tensor:
    """[n, n], orthogonal and symmetric, in fp32."""
    index = torch.arange(size)
    common = index[:, None] & index
    parity = torch.zeros_like(common)
    while bool(common.any()):
        parity ^= common & 1
        common = common >> 1
    matrix: Tensor = (1.0 - 2.0 * parity) / size**0.5
    return matrix


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """x [..., K] rotated in blocks of as many as there are signs. Raises InputError where they do not divide K."""
    return _in_blocks(x, signs.to(x)[:, None] * hadamard_matrix(len(signs)).to(x))


def unrotate(y: Tensor, signs: Tensor) -> Tensor:
    """Turns back what ``rotate`` turned."""
    return _in_blocks(y, hadamard_matrix(len(signs)).to(y) * signs.to(y))


def _in_blocks(x: Tensor, matrix: Tensor) -> Tensor:
    size = len(matrix)
    if x.shape[-1] % size:
        raise InputError(
            f"blocks of {size} do not fill a dimension of {x.shape[-1]}: choose a size that divides it"
        )
    if (
        x.dim() == 2 and not x.is_contiguous() and x.t().is_contiguous()
    ):  # as it lies: a copy costs more than the products
        return torch.matmul(matrix.t(), x.t().view(-1, size, x.shape[0])).flatten(0, 1).t()
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    return torch.matmul(blocks, matrix).flatten(-2)

"""The formats in plain float64, written out of their definitions: the oracle of everything beside it.

It lists all numbers of a format; a number becomes the nearest of them, of two as near the one whose code is even. Slow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stabilitylab.formats.number_format import NumberFormat


def finite_numbers(format: NumberFormat) -> NDArray[np.float64]:
    """The numbers >= 0 of a format, ascending: the place of a number is its code."""
    numbers = []
    for field in range(1 << format.exponent_bits):
        for fraction in range(1 << format.mantissa_bits):
            mantissa = fraction / 2**format.mantissa_bits
            exponent = max(field, 1) - format.bias
            value = (mantissa + (field > 0)) * 2.0**exponent
            if value <= format.largest:
                numbers.append(value)
    return np.array(numbers)


def reference_codes(x: NDArray[np.float64], format: NumberFormat) -> NDArray[np.int64]:
    """Codes of finite numbers, cut off at the largest."""
    grid = finite_numbers(format)
    magnitude = np.minimum(np.abs(x), format.largest)
    above = np.searchsorted(grid, magnitude).clip(1, len(grid) - 1)
    below = above - 1
    up, down = grid[above] - magnitude, magnitude - grid[below]
    nearer_above = (up < down) | ((up == down) & (above % 2 == 0))
    code = np.where(nearer_above, above, below)
    return np.asarray(code + (np.signbit(x) << (format.bits - 1)))


def reference_values(code: NDArray[np.int64], format: NumberFormat) -> NDArray[np.float64]:
    """The finite numbers that codes stand for."""
    magnitude = finite_numbers(format)[code & ((1 << (format.bits - 1)) - 1)]
    return np.asarray(np.where(code >> (format.bits - 1) & 1, -magnitude, magnitude))

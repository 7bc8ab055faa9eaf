"""Many claims at once: Holm's step-down (1979) holds the chance of one false verdict or more in a family at alpha.

It compares the i-th smallest of m p-values with alpha / (m - i + 1), and ends at the first that fails. An e-value's inverse is a
p-value (Markov), and the inverse of an e-process' largest value so far is one at every look (Ville): so Holm's guarantee, too,
holds while one adds seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: the family rejects those of at most alpha. NaN (no data) counts as 1."""
    p = np.nan_to_num(np.asarray(p_values, dtype=float), nan=1.0)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1.0)
    return [float(x) for x in adjusted]

"""Which component of a mixture each sample comes from, and how many of that component came before it.

Samples go by windows of 1,024. A window gives each component a whole number of them, as near as possible to its weight with what
earlier windows owe carried over (largest remainder), and shuffles them. So after any number of windows a component has had its
share to within about one sample, and

    component(i), rank(i)      are functions of (seed, i, weights) alone:

rank counts the component's earlier samples, which is the number of its next row. Weights may move linearly over a range of samples
(the mix ramp that GLM-130B took after its collapse at 22.8k steps). The first use sums the counts of windows from the beginning,
some 20 ms for each million samples.

Shapes: C components, M windows, R samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from glm.data.random import bits

Ints = NDArray[np.int64]

WINDOW = 1024
_ORDER = 1 << 32  # draws of the order within windows


class Mixture:
    """A schedule of components.

    Args:
        weights: of the components, after the ramp; any positive scale.
        before: the weights before it; None: as ``weights``.
        ramp: (first, last) sample of the ramp.
        seed: of the order.
    """

    def __init__(
        self,
        weights: Sequence[float],
        before: Sequence[float] | None = None,
        ramp: tuple[int, int] = (0, 0),
        *,
        seed: int,
    ) -> None:
        after_C = np.asarray(weights, np.float64)
        before_C = after_C if before is None else np.asarray(before, np.float64)
        self._after_C, self._before_C = after_C / after_C.sum(), before_C / before_C.sum()
        self._ramp, self._seed = ramp, seed
        self._counts_MC: list[Ints] = []  # of each window
        self._sums_MC: list[Ints] = [np.zeros(len(after_C), np.int64)]  # of all windows before each
        self._owed_C = np.zeros(len(after_C))

    def weights_at(self, sample: float) -> NDArray[np.float64]:
        """Weights at a sample, summing to 1."""
        first, last = self._ramp
        done = (
            np.clip((sample - first) / (last - first), 0.0, 1.0) if last > first else float(sample >= first)
        )
        weights_C: NDArray[np.float64] = self._before_C + (self._after_C - self._before_C) * done
        return weights_C

    def place(self, sample_R: Ints) -> tuple[Ints, Ints]:
        """The component of each sample, and its number within that component."""
        component_R, rank_R = np.empty_like(sample_R), np.empty_like(sample_R)
        window_R, within_R = np.divmod(sample_R, WINDOW)
        for window in np.unique(window_R).tolist():
            here = window_R == window
            counts_C, before_C = self._window(window)
            assigned = np.repeat(np.arange(len(counts_C)), counts_C)
            assigned = assigned[bits(self._seed, window, _ORDER + np.arange(WINDOW)).argsort(kind="stable")]
            mine = assigned[within_R[here]]
            seen = np.cumsum(assigned[:, None] == np.arange(len(counts_C)), axis=0)
            component_R[here] = mine
            rank_R[here] = before_C[mine] + seen[within_R[here], mine] - 1
        return component_R, rank_R

    def _window(self, window: int) -> tuple[Ints, Ints]:
        while len(self._counts_MC) <= window:
            middle = (len(self._counts_MC) + 0.5) * WINDOW
            due_C = WINDOW * self.weights_at(middle) + self._owed_C
            # A component that had too much is owed a negative number, and waits.
            counts_C = np.maximum(np.floor(due_C), 0).astype(np.int64)
            left = WINDOW - int(counts_C.sum())
            order = np.argsort(-(due_C - counts_C), kind="stable")
            if left >= 0:
                counts_C[order[:left]] += 1
            else:
                with_some = [c for c in order[::-1].tolist() if counts_C[c] > 0]
                counts_C[with_some[:-left]] -= 1
            self._owed_C = due_C - counts_C
            self._counts_MC.append(counts_C)
            self._sums_MC.append(self._sums_MC[-1] + counts_C)
        return self._counts_MC[window], self._sums_MC[window]

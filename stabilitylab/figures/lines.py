"""Lines over steps before they are drawn, in a figure or a page: series under labels, marks, means of seeds, the kind of axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from stabilitylab.figures.numbers import positive

Lines = Mapping[str, Sequence["pd.Series[float]"]]


class Mark(NamedTuple):
    """An episode to show on a curve: first step, last step (None: still open), and its kind."""

    onset: int
    end: int | None
    text: str


def together(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """All values of several arrays, none of none."""
    return np.concatenate([np.empty(0), *arrays])


def mean_of_seeds(several: Sequence[pd.Series[float]]) -> pd.Series[float]:
    """Mean of seeds at each step; not finite where one of them is not."""
    frame = pd.concat([s.rename(i) for i, s in enumerate(several) if len(s)], axis=1)
    recorded = pd.concat([s.notna().rename(i) | True for i, s in enumerate(several) if len(s)], axis=1)
    broken = recorded.notna() & ~np.isfinite(frame)
    return frame.mean(axis=1).mask(broken.any(axis=1))


def logarithmic(log: bool | str, values: np.ndarray) -> bool:
    """Whether the value axis is logarithmic."""
    if not log or not positive(values):
        return False
    finite = values[np.isfinite(values)]
    return log is True or bool(finite.max() > 30 * np.median(finite))

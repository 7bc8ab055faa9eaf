"""Cells of a map before they are drawn: sites down, steps across.

Where there are more steps than a screen can tell apart, neighbours are joined by their largest value, and one that is not finite
wins. Steps lie across at their own places, however unevenly they were measured; a measurement holds until the next one, or for
twice the usual distance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

COLUMNS = 400


ROWS = 200


BROKEN = "#d62728"


_APART = (2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Cells(NamedTuple):
    """What a map shows.

    Attributes:
        values, known: sites x columns, and whether anything was recorded there.
        steps, sites: names of columns and rows.
        stretch: from where to where the columns reach: in steps where ``even``, else counted.
        even: whether the columns lie at their own steps.
    """

    values: NDArray[np.float64]
    known: NDArray[np.bool_]
    steps: list[object]
    sites: list[str]
    stretch: tuple[float, float]
    even: bool


def cells(matrix: pd.DataFrame, *, recorded: pd.DataFrame | None = None, across: str = "step") -> Cells:
    """The cells of a map; arguments as of ``heat_map``."""
    everywhere = np.ones(matrix.shape, dtype=bool)
    known = everywhere if recorded is None else recorded.reindex_like(matrix).to_numpy(dtype=bool)
    stretch: tuple[float, float] | None = None
    if across == "step" and _are_steps(matrix.columns):
        matrix, known, stretch = _at_their_steps(matrix, known)
    values, known, steps, sites = _joined(matrix, known)
    return Cells(values, known, steps, sites, stretch or (-0.5, len(steps) - 0.5), stretch is not None)


def _are_steps(columns: pd.Index[Any]) -> bool:
    return (
        len(columns) > 1 and pd.api.types.is_integer_dtype(columns) and bool(columns.is_monotonic_increasing)
    )


def _at_their_steps(
    matrix: pd.DataFrame, known: NDArray[np.bool_]
) -> tuple[pd.DataFrame, NDArray[np.bool_], tuple[float, float]]:
    """The matrix on at most COLUMNS evenly spaced columns, which of its cells are known, and from where to where they reach."""
    steps = matrix.columns.to_numpy(dtype=np.int64)
    apart = np.diff(steps)
    first, span = int(steps[0]), int(steps[-1] - steps[0]) + 1
    width = max(int(apart.min()), -(-span // COLUMNS), 1)
    stretch = (steps - first) // width
    starts = np.flatnonzero(np.r_[True, np.diff(stretch) > 0])
    values = matrix.to_numpy(dtype=float)
    broken = np.maximum.reduceat(known & ~np.isfinite(values), starts, axis=1)
    largest = np.maximum.reduceat(np.where(np.isfinite(values), values, -np.inf), starts, axis=1)
    seen = np.maximum.reduceat(known, starts, axis=1)
    measured = stretch[starts]
    count = int(measured[-1]) + 1
    holds = -(-2 * int(np.quantile(apart, 0.9)) // width)
    latest = np.searchsorted(measured, np.arange(count), side="right") - 1
    fresh = np.arange(count) - measured[latest] < max(holds, 1)
    even = np.where(fresh, np.where(broken | ~seen, np.nan, largest)[:, latest], np.nan)
    places = first + width * np.arange(count)
    return (
        pd.DataFrame(even, index=matrix.index, columns=places),
        seen[:, latest] & fresh,
        (first - 0.5, float(first + width * count) - 0.5),
    )


def _joined(
    matrix: pd.DataFrame, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[object], list[str]]:
    """Values, where any was recorded, steps and sites, with at most COLUMNS columns and ROWS rows."""
    values = matrix.to_numpy(dtype=float)
    for axis, most in ((1, COLUMNS), (0, ROWS)):
        length = values.shape[axis]
        if length > most:
            starts = np.unique(np.arange(most) * length // most)
            broken = np.maximum.reduceat(known & ~np.isfinite(values), starts, axis=axis)
            largest = np.maximum.reduceat(np.where(np.isfinite(values), values, -np.inf), starts, axis=axis)
            known = np.maximum.reduceat(known, starts, axis=axis)
            values = np.where(broken | ~known, np.nan, largest)
    return (
        values,
        known,
        [matrix.columns[i] for i in _starts(matrix.shape[1], COLUMNS)],
        [str(matrix.index[i]) for i in _starts(matrix.shape[0], ROWS)],
    )


def _starts(length: int, most: int) -> np.ndarray:
    return np.arange(length) if length <= most else np.unique(np.arange(most) * length // most)


def named_sites(sites: Sequence[str], most: int) -> list[int]:
    """Which rows are named: all where they fit, else those of round numbers (layers.0, layers.10, ...), the first and the last."""
    count = len(sites)
    if count <= most:
        return list(range(count))
    numbers = [int(found[-1]) if (found := re.findall(r"\d+", site)) else None for site in sites]
    for apart in _APART:
        places = [i for i, number in enumerate(numbers) if number is not None and number % apart == 0]
        places = places if len(places) > 2 else list(range(0, count, apart))
        if len(places) <= most:
            break
    room = max(1, count // (2 * most))  # names closer than this would overlap
    return [0, *(i for i in places if room < i < count - 1 - room), count - 1]

"""Numbers as figures, charts and tables show them: as words, and in so few points that a screen can tell them apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

FP16_MAX = 65504.0


def plain(value: float) -> str:
    """A number as people write it: 0.002, 1.5, 65,504, 3e-09, inf."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def positive(values: np.ndarray) -> bool:
    """Whether a logarithmic axis can show every finite value, and there is one."""
    finite = values[np.isfinite(values)]
    return bool(finite.size) and bool((finite > 0).all())


def thinned(series: pd.Series[float], points: int = 2000) -> pd.Series[float]:
    """At most about ``points`` values of a curve: of each stretch of steps its lowest, its highest and one that is not finite.

    Drawing fewer points than were recorded loses no spike and no NaN.
    """
    if len(series) <= points:
        return series
    import pandas as pd

    values = series.to_numpy(dtype=float)
    stretch = np.arange(len(values)) * (points // 3) // len(values)
    frame = pd.DataFrame({"stretch": stretch, "value": np.where(np.isfinite(values), values, np.nan)})
    grouped = frame.dropna().groupby("stretch")["value"]
    bad = pd.Series(np.flatnonzero(~np.isfinite(values)))
    first_bad = bad.groupby(stretch[bad.to_numpy()]).first()
    keep = np.unique(np.concatenate([grouped.idxmin(), grouped.idxmax(), first_bad, [0, len(values) - 1]]))
    return series.iloc[keep.astype(int)]

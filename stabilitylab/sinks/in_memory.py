"""Keeps telemetry in memory, for notebooks and tests: the same tidy table as a run folder's, in pandas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stabilitylab.telemetry import Event, Samples

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("step", "family", "site", "statistic", "index", "value")


class MemorySink:
    """Keeps everything until asked. ``frame`` is tidy and follows the rules of a run folder, with rewinds.

    It holds about 20 bytes per value; for a long run write Parquet instead.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = False
        self._flushes: list[Samples] = []

    def write(self, samples: Samples, events: Sequence[Event]) -> None:
        """Keep one flush. A ``rewind`` among the events drops older samples from its step on, before the new ones come."""
        for event in events:
            if event.kind == "rewind":
                self._flushes = [_before(flush, event.step) for flush in self._flushes]
        self.events.extend(events)
        self._flushes.append(
            Samples(samples.keys, samples.step.copy(), samples.key.copy(), samples.value.copy())
        )

    def close(self) -> None:
        """Nothing to release; the kept values stay readable."""
        self.closed = True

    @property
    def frame(self) -> pd.DataFrame:
        """All samples as columns step, family, site, statistic, index, value; the words are categories."""
        import pandas as pd

        keys = list(dict.fromkeys(key for flush in self._flushes for key in flush.keys))
        number = {key: i for i, key in enumerate(keys)}
        rows = [
            np.array([number[key] for key in flush.keys], dtype=np.int64)[flush.key]
            for flush in self._flushes
        ]
        code = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        columns: dict[str, object] = {"step": _join([flush.step for flush in self._flushes], np.int64)}
        for name in ("family", "site", "statistic"):
            words = [getattr(key, name) for key in keys]
            columns[name] = pd.Categorical(words, categories=list(dict.fromkeys(words)))[code]
        columns["index"] = np.array([key.index for key in keys], dtype=np.int32)[code]
        columns["value"] = _join([flush.value for flush in self._flushes], np.float64)
        return pd.DataFrame(columns, columns=list(COLUMNS))


def _before(samples: Samples, step: int) -> Samples:
    kept = samples.step < step
    return Samples(samples.keys, samples.step[kept], samples.key[kept], samples.value[kept])


def _join(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)

"""Logs that come as records, one small set of numbers at a time, and run folders.

The first records settle which column is the loss; later columns under another name do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import STEP
from stabilitylab.logs.columns import choose_columns
from stabilitylab.logs.log import BLOCK_ROWS, Log, RowBlock, whole_steps
from stabilitylab.telemetry import GRADIENT_NORM, LEARNING_RATE, LOSS, LOSS_SCALES, SKIPPED

PEEK = 10_000

LoggedRecord = tuple[float, dict[str, float]]


def gather(records: Iterator[LoggedRecord], columns: Mapping[str, str], source: Path) -> Iterator[RowBlock]:
    """Gather records into blocks; neighbours of one step become one row."""
    signals = [signal for signal in columns if signal != STEP]
    wanted = {columns[signal]: signal for signal in signals}
    while True:
        steps: list[float] = []
        rows: list[dict[str, float]] = []
        for step, values in records:
            row = {wanted[name]: value for name, value in values.items() if name in wanted}
            if not row:
                continue
            if steps and steps[-1] == step and not rows[-1].keys() & row.keys():
                rows[-1] |= row
            else:
                steps.append(step)
                rows.append(row)
            if len(rows) == BLOCK_ROWS:
                break
        if not rows:
            return
        yield RowBlock(
            whole_steps(np.array(steps), f"{source}, {columns.get(STEP, STEP)!r}"),
            {s: np.array([row.get(s, 0.0) for row in rows], dtype=np.float64) for s in signals},
            {s: np.array([s in row for row in rows], dtype=np.bool_) for s in signals},
        )


RUN_SIGNALS = (LOSS, GRADIENT_NORM, LOSS_SCALES[0], LOSS_SCALES[1], LEARNING_RATE, SKIPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLog(Log):
    """A run folder's telemetry, superseded history left out."""

    @classmethod
    def open(cls, path: Path, *, loss: str | None = None) -> Self:
        from stabilitylab.runs import load_run

        metrics = load_run(path).metrics
        scalars = metrics[metrics["size"] == 0]
        names = (scalars["family"] + "/" + scalars["site"] + "/" + scalars["statistic"]).tolist()
        columns = {signal: signal for signal in RUN_SIGNALS if signal in names}
        if loss is not None:
            columns[LOSS] = choose_columns(names, source=path, loss=loss)[LOSS]
        if LOSS not in columns:
            raise InputError(f"{path} has recorded no {LOSS}: name another metric with --loss")
        return cls(path=path, columns=columns, format="stabilitylab run folder")

    def blocks(self) -> Iterator[RowBlock]:
        from stabilitylab.runs import load_run

        run = load_run(self.path)
        series = {signal: run.series(name) for signal, name in self.columns.items()}
        indices = [one.index.to_numpy() for one in series.values()]
        steps_N = np.unique(np.concatenate(indices)).astype(np.int64)
        values = {
            signal: one.reindex(steps_N).to_numpy().astype(np.float64) for signal, one in series.items()
        }
        logged = {signal: np.isin(steps_N, one.index.to_numpy()) for signal, one in series.items()}
        if len(steps_N):
            yield RowBlock(steps_N, values, logged)

"""Logs that come as records, one small set of numbers at a time: JSON lines, run folders.

Which column is the loss is settled by the first records; what appears later under another name is not looked
at.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from stabilitylab.errors import InputError
from stabilitylab.logs.log import BLOCK_ROWS, STEP, Block, Log, choose_columns, whole_steps
from stabilitylab.telemetry import GRADIENT_NORM, LEARNING_RATE, LOSS, LOSS_SCALES, SKIPPED

PEEK = 10_000

Record = tuple[float, dict[str, float]]


def gather(records: Iterator[Record], columns: Mapping[str, str], source: Path) -> Iterator[Block]:
    """Records into blocks; neighbours of one step are one row."""
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
        yield Block(
            whole_steps(np.array(steps), f"{source}, {columns.get(STEP, STEP)!r}"),
            {s: np.array([row.get(s, 0.0) for row in rows], dtype=np.float64) for s in signals},
            {s: np.array([s in row for row in rows], dtype=np.bool_) for s in signals},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonLinesLog(Log):
    """One JSON object a line."""

    @classmethod
    def open(cls, path: Path, *, loss: str | None = None, step: str | None = None) -> Self:
        names: dict[str, None] = {}
        for _, record in itertools.islice(_json_lines(path), PEEK):
            names.update(dict.fromkeys(record))
        if not names:
            raise InputError(f"{path} holds no JSON objects: a log needs one a line")
        return cls(path=path, columns=choose_columns(names, source=path, loss=loss, step=step))

    def blocks(self) -> Iterator[Block]:
        return gather(self._records(), self.columns, self.path)

    def _records(self) -> Iterator[Record]:
        names = set(self.columns.values())
        step_name = self.columns.get(STEP)
        for row, (line, record) in enumerate(_json_lines(self.path)):
            values: dict[str, float] = {}
            for name in names & record.keys():
                if record[name] is not None:
                    values[name] = _float(record[name], f"{self.path}, line {line}, {name!r}")
            step = float(row) if step_name is None else values.pop(step_name, None)
            if step is not None and values:
                yield step, values


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line; a last line cut short by a kill is left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n"):
                    return
                raise InputError(f"{path}, line {number} is not JSON: repair or remove the line") from None
            if not isinstance(record, dict):
                raise InputError(f"{path}, line {number} is no JSON object: a log needs one a line")
            yield number, record


def _float(value: Any, source: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{source}: {str(value)[:40]!r} is not a number") from None


_RUN_SIGNALS = (LOSS, GRADIENT_NORM, LOSS_SCALES[0], LOSS_SCALES[1], LEARNING_RATE, SKIPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLog(Log):
    """A run folder's telemetry, superseded history left out."""

    @classmethod
    def open(cls, path: Path, *, loss: str | None = None) -> Self:
        from stabilitylab.runs import load_run

        metrics = load_run(path).metrics
        scalars = metrics[metrics["size"] == 0]
        names = (scalars["family"] + "/" + scalars["site"] + "/" + scalars["statistic"]).tolist()
        columns = {signal: signal for signal in _RUN_SIGNALS if signal in names}
        if loss is not None:
            columns[LOSS] = choose_columns(names, source=path, loss=loss)[LOSS]
        if LOSS not in columns:
            raise InputError(f"{path} has recorded no {LOSS}: name another metric with --loss")
        return cls(path=path, columns=columns)

    def blocks(self) -> Iterator[Block]:
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
            yield Block(steps_N, values, logged)

"""Turns rows of named numbers, which every reader of records gives, into logs.

A reader gives ``Row``s: the part of the log they belong to (a run, a rank; "" where it does not say) and the numbers under the
log's own names, ``None`` where a name stood without a value. This module divides them into segments:

    parts that the reader names                              one segment each
    a step that falls back to the start of counting          a new run or phase
    a step that falls back further on                        a restart of the same run: no new segment
    a counter that begins again with every epoch             counted on

It chooses columns by what all rows of a segment hold. It reads a log of up to ``KEPT`` rows once and keeps it; a longer one it
reads once to learn its columns, and once more for every segment.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import STEP, counter_of
from stabilitylab.logs.log import BLOCK_ROWS, Log, RowBlock, whole_steps
from stabilitylab.logs.reading import Reading, Row
from stabilitylab.logs.segment_columns import SegmentColumns, columns_of, notes_of
from stabilitylab.telemetry import LOSS

KEPT = 200_000
_PILE = 4096  # rows processed together
MOST_BAD = 0.1  # a larger share of unreadable lines is not damage but another format
_UNORDERED_SHARE = 0.25
_ROUND = re.compile(r"\b(?:round|cycle|sweep|pass)s?$", re.IGNORECASE)  # not fold, seed: those are runs
_ENDS = 3  # values that show where a run's loss begins and ends


@dataclass(slots=True)
class Steps:
    """Finds a row's step, and its run within its part: see the table at the head of this file.

    Attributes:
        counter: the column that counts; None: the row number is the step.
        epoch: the column of epochs, in each of which the counter begins again; None: it does not; "": it does, without such a
            column.
        order: whether a step that falls back means anything.
        piece: the last row's run, by its number within the part.
        before: the last row's step.
    """

    counter: str | None
    epoch: str | None = None
    order: bool = True
    piece: int = 0
    count: int = 0
    offset: float = 0.0
    first: float | None = None
    before: float | None = None
    gap: float | None = None
    epoch_before: float | None = None

    def take(self, values: Mapping[str, float | None]) -> float | None:
        """The step of the next row; None where it holds none."""
        if self.counter is None:
            step: float | None = float(self.count)
            self.count += 1
        else:
            step = values.get(self.counter)
        if step is None:
            return None
        before = self.before
        if self.epoch == "" and before is not None and step + self.offset <= before:
            self.offset = before + (self.gap or 1.0) - (self.first or 0.0)
        if self.epoch == "":
            step += self.offset
        elif self.epoch is not None:
            epoch = values.get(self.epoch)
            if before is not None and step + self.offset <= before and epoch != self.epoch_before:
                self.offset = before + (self.gap or 1.0) - step
            self.epoch_before = epoch
            step += self.offset
        if before is not None and step != before:
            if step > before:
                self.gap = step - before if self.gap is None else min(self.gap, step - before)
            elif (
                self.order
                and self.first is not None
                and step <= max(self.first, 1.0)
                and step <= (self.gap or 1.0)
            ):
                self.piece, self.first, self.gap = self.piece + 1, None, None
        if self.first is None:
            self.first = step
        self.before = step
        return step

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RowLog(Log):
    """One segment of a reading."""

    reading: Reading
    part: str
    kept: tuple[Row, ...] | None
    order: bool
    epoch: str | None
    notes: tuple[str, ...] = ()
    piece: int | None = None

    def blocks(self) -> Iterator[RowBlock]:
        for piece, block in self.pieces():
            if self.piece is None or piece == self.piece:
                yield block

    def pieces(self) -> Iterator[tuple[int, RowBlock]]:
        """Blocks, each with the number of its run within the part."""
        signals = [signal for signal in self.columns if signal != STEP]
        wanted = {self.columns[signal]: signal for signal in signals}
        counting = Steps(self.columns.get(STEP), self.epoch, self.order)
        piece = 0
        steps: list[float] = []
        rows: list[dict[str, float]] = []
        held = self.kept if self.kept is not None else self.reading.rows()
        for part, values in held:
            if part != self.part:
                continue
            row = {wanted[n]: v for n, v in values.items() if n in wanted and v is not None}
            if not row:
                continue
            step = counting.take(values)
            if step is None:
                continue
            if counting.piece != piece:
                if rows:
                    yield piece, self._block(steps, rows, signals)
                    steps, rows = [], []
                piece = counting.piece
            if steps and steps[-1] == step and not rows[-1].keys() & row.keys():
                rows[-1] |= row
            else:
                if len(rows) >= BLOCK_ROWS:
                    yield piece, self._block(steps, rows, signals)
                    steps, rows = [], []
                steps.append(step)
                rows.append(row)
        if rows:
            yield piece, self._block(steps, rows, signals)

    def _block(self, steps: list[float], rows: list[dict[str, float]], signals: list[str]) -> RowBlock:
        return RowBlock(
            whole_steps(np.array(steps), f"{self.path}, {self.columns.get(STEP, STEP)!r}"),
            {s: np.array([row.get(s, 0.0) for row in rows], dtype=np.float64) for s in signals},
            {s: np.array([s in row for row in rows], dtype=np.bool_) for s in signals},
        )


def logs_of(reading: Reading, path: Path, *, loss: str | None, step: str | None) -> list[RowLog]:
    """The segments of a reading that hold a training loss; counts the others as left out.

    Raises:
        InputError: there is no such segment; the message names what there is.
    """
    parts: dict[str, SegmentColumns] = {}
    kept: list[Row] | None = []
    waiting: dict[str, list[Mapping[str, float | None]]] = {}
    for row in reading.rows():
        if (pile := waiting.get(row[0])) is None:
            parts[row[0]], pile = SegmentColumns(), waiting.setdefault(row[0], [])
        pile.append(row[1])
        if len(pile) == _PILE:
            parts[row[0]].add_all(pile)
            pile.clear()
        if kept is not None:
            kept.append(row)
            if len(kept) > KEPT:
                kept = None
    for name, pile in waiting.items():
        parts[name].add_all(pile)
    rows = sum(part.rows for part in parts.values())
    bad = sum(count for reason, count in reading.left_out.items() if reason.startswith("damaged"))
    if bad > MOST_BAD * (rows + bad):
        more = f", and {bad - 1:,} more of {rows + bad:,}" if bad > 1 else ""
        raise InputError(f"{path}, {reading.examples[0]}{more}: repair or remove it")
    if not rows:
        raise InputError(f"{path} holds no values ({reading.format}): is it the training log?")
    if (
        rows == 1
        and "JSON" in reading.format
        and not any(counter_of(n) for p in parts.values() for n in p.counts)
    ):
        raise InputError(f"{path} holds one JSON object and no step: it is no log")
    held = None if kept is None else tuple(kept)
    counted = Counter(reading.left_out)
    logs: list[RowLog] = []
    problem: InputError | None = None
    for name, part in parts.items():
        try:
            columns = columns_of(reading, part, path, loss=loss, step=step)
        except InputError as error:
            problem = problem or error
            counted["rows of a part without a training loss"] += part.rows
            continue
        logs += _pieces(reading, path, name, part, columns, held)
    reading.left_out.clear()
    reading.left_out.update(counted)
    if not logs:
        assert problem is not None
        raise problem
    return logs


def _pieces(
    reading: Reading,
    path: Path,
    name: str,
    part: SegmentColumns,
    columns: dict[str, str],
    held: tuple[Row, ...] | None,
) -> list[RowLog]:
    if STEP in columns and held is not None:
        told = (row for where, row in held if where == name and columns[LOSS] in row)
        if not any(columns[STEP] in row for row in told):  # no loss stands beside the counter
            columns = {signal: column for signal, column in columns.items() if signal != STEP}
    counter = columns.get(STEP, "")
    order = part.backward[counter] <= _UNORDERED_SHARE * part.rows
    epoch = (
        "epoch"
        if counter != "epoch"
        and part.backward[counter]
        and "epoch" not in part.fractions
        and part.counts["epoch"] >= part.counts[columns[LOSS]]
        and part.last.get("epoch", 0) > part.first.get("epoch", 0)
        else None
    )
    if epoch is None and part.backward[counter] and held is not None:
        epoch = next((n for n in part.counts if _is_outer(n, counter, part, held, name)), None)
    if reading.format.startswith("HuggingFace") and part.filtered:
        reading.notes.append(
            f"the gradient norm is not finite in {part.filtered:,} rows whose loss is: "
            "the Trainer's filter (logging_nan_inf_filter) puts an average in a NaN loss's place"
        )
    log = RowLog(
        path=path,
        columns=columns,
        reading=reading,
        part=name,
        kept=held,
        order=order,
        epoch=epoch,
        name=name,
        format=reading.format,
        left_out=reading.left_out,
        notes=(*reading.notes, *notes_of(part, columns)),
    )
    count = 1 + max((piece for piece, _ in log.pieces()), default=0) if part.backward[counter] else 1
    if count > 1 and _goes_on(log):
        return [replace(log, epoch="")]
    if count == 1:
        return [log]
    label = f"{name} " if name else ""
    return [_renamed(log, f"{label}run {i + 1}", i) for i in range(count)]


def _is_outer(outer: str, counter: str, part: SegmentColumns, held: Sequence[Row], name: str) -> bool:
    """Whether a column counts rounds in each of which the counter starts again."""
    if not _ROUND.search(outer) or outer in part.fractions or part.backward[outer]:
        return False
    before: tuple[float, float] | None = None
    for where, row in held:
        step, round_ = row.get(counter), row.get(outer)
        if where != name or step is None or round_ is None:
            continue
        if before is not None and step < before[0] and round_ <= before[1]:
            return False
        before = step, round_
    return before is not None


def _goes_on(log: RowLog) -> bool:
    """Whether runs whose counter begins again are epochs of one run: they count alike, and each begins where the loss had got to,
    far from where the first began."""
    steps: dict[int, list[NDArray[np.int64]]] = {}
    losses: dict[int, list[NDArray[np.float64]]] = {}
    for piece, block in log.pieces():
        there_N = block.logged[LOSS]
        steps.setdefault(piece, []).append(block.steps[there_N])
        losses.setdefault(piece, []).append(block.values[LOSS][there_N])
    counted = [np.concatenate(steps[piece]) for piece in sorted(steps)]
    told = [np.concatenate(losses[piece]) for piece in sorted(losses)]
    if any(len(one) < _ENDS for one in told) or any(one[0] != counted[0][0] for one in counted):
        return False
    if any(one[-1] != counted[0][-1] for one in counted[1:-1]) or counted[-1][-1] > counted[0][-1]:
        return False
    first = float(np.median(told[0][:_ENDS]))
    for before, after in pairwise(told):
        end, begin = float(np.median(before[-_ENDS:])), float(np.median(after[:_ENDS]))
        noise = float(np.median(np.abs(np.diff(before))))
        if not (first - end > 4 * noise and begin - end < 0.3 * (first - end)):
            return False
    return True


def _renamed(log: RowLog, name: str, piece: int) -> RowLog:
    return replace(log, name=name, piece=piece)

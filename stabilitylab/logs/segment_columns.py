"""Learns from one segment's rows which of its columns is which signal.

A column named like a counter that stands still counts nothing; where no column has such a name, whole numbers that rise in every
row count. Notes say in sentences what is odd about the segment as a whole.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import STEP, counter_of, is_evaluation, is_loss
from stabilitylab.logs.columns import choose_columns
from stabilitylab.logs.reading import Reading
from stabilitylab.telemetry import GRADIENT_NORM, LOSS

STEP_ABOVE = "step in the line above"  # in a text; believed where every loss has one
# Names of what rises with the steps but does not count them.
_CLOCK = re.compile(
    r"time|elapsed|second|duration|eta|date|byte|mem|epoch|\bpid\b|/sec\b|(^|[_ /])(ms|s|ts|t|min|hours?)$",
    re.IGNORECASE,
)
_LIKE_STEPS = re.compile(r"step|iter(?!m)", re.IGNORECASE)  # step_id, timestep, iter_idx
_AMOUNT = re.compile(r"^(?:steps|iterations|iters|updates)$", re.IGNORECASE)
_AMOUNTS = 0.25  # share of rows in which an amount falls
_BARE_TOTAL = re.compile(r"(?:train(?:ing)?[ _/])?(?:total|overall)\b", re.IGNORECASE)

_A_DATE = 1e9  # seconds since 1970; nothing counts from there
_NEARLY_ALL = 0.9  # of the losses have a counter; the others are another's, such as a validation's
_FEW = 32  # fewer rows are not worth columns
_INFINITE = (math.inf, -math.inf)


@dataclass(slots=True)
class SegmentColumns:
    """What the rows of one segment have shown about its columns."""

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    nulls: Counter[str] = field(default_factory=Counter)
    fractions: set[str] = field(default_factory=set)
    last: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    backward: Counter[str] = field(default_factory=Counter)
    resets: Counter[str] = field(default_factory=Counter)  # those falls at which an epoch begins
    repeated: Counter[str] = field(default_factory=Counter)
    last_row: dict[str, int] = field(default_factory=dict)
    filtered: int = 0  # rows with a finite loss beside a norm that is not

    def add(self, values: Mapping[str, float | None]) -> None:
        epoch = values.get("epoch")
        begins = epoch is not None and epoch > self.last.get("epoch", math.inf)
        for name, value in values.items():
            if value is None:
                self.nulls[name] += 1
                continue
            self.counts[name] += 1
            if not value.is_integer() and value not in _INFINITE:
                self.fractions.add(name)
            before = self.last.get(name)
            if before is None:
                self.first[name] = value
            elif value <= before:
                if value < before:
                    self.backward[name] += 1
                    self.resets[name] += begins
                else:
                    self.repeated[name] += 1
            self.last[name] = value
            self.last_row[name] = self.rows
        loss, norm = values.get("loss"), values.get("grad_norm")
        self.filtered += (
            loss is not None and norm is not None and math.isfinite(loss) and not math.isfinite(norm)
        )
        self.rows += 1

    def add_all(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        """``add`` each row; column by column where rows hold the same names, which takes a fraction of the time."""
        names = rows[0].keys() if rows else ()
        if len(rows) < _FEW or any(row.keys() != names for row in rows):
            for row in rows:
                self.add(row)
            return
        columns = {}
        for name in names:
            column = [row[name] for row in rows]
            logged_N = (
                np.array([x is not None for x in column]) if None in column else np.ones(len(rows), bool)
            )
            columns[name] = np.array(column, dtype=np.float64), logged_N
        if "loss" in columns and "grad_norm" in columns:
            finite_N, norm_N = np.isfinite(columns["loss"][0]), ~np.isfinite(columns["grad_norm"][0])
            self.filtered += int((finite_N & norm_N & columns["grad_norm"][1]).sum())
        self.add_columns(columns)

    def add_columns(self, columns: Mapping[str, tuple[NDArray[np.float64], NDArray[np.bool_]]]) -> None:
        """``add`` rows given as columns: values, and whether they are there."""
        rows = 0
        begins_N = self._begins(columns)
        for name, (values_N, logged_N) in columns.items():
            rows = len(values_N)
            there_N = values_N[logged_N]
            if rows > len(there_N):
                self.nulls[name] += rows - len(there_N)
            if not len(there_N):
                continue
            self.counts[name] += len(there_N)
            if name not in self.fractions and not bool((there_N == np.round(there_N)).all()):
                self.fractions.add(name)
            rises_N = np.diff(there_N) if name not in self.last else np.diff(there_N, prepend=self.last[name])
            if back := int((rises_N < 0).sum()):
                self.backward[name] += back
                if begins_N is not None and len(there_N) == rows == len(rises_N) + (name not in self.last):
                    self.resets[name] += int(((rises_N < 0) & begins_N[rows - len(rises_N) :]).sum())
            if same := int((rises_N == 0).sum()):
                self.repeated[name] += same
            self.first.setdefault(name, float(there_N[0]))
            self.last[name] = float(there_N[-1])
            self.last_row[name] = self.rows + int(np.flatnonzero(logged_N)[-1])
        self.rows += rows

    def _begins(
        self, columns: Mapping[str, tuple[NDArray[np.float64], NDArray[np.bool_]]]
    ) -> NDArray[np.bool_] | None:
        """The rows in which an epoch begins."""
        if "epoch" not in columns or not columns["epoch"][1].all():
            return None
        epochs_N = columns["epoch"][0]
        return np.diff(epochs_N, prepend=self.last.get("epoch", epochs_N[0])) > 0


def columns_of(
    reading: Reading, part: SegmentColumns, path: Path, *, loss: str | None, step: str | None
) -> dict[str, str]:
    """Signal -> its column in one segment, by the names and by what the columns hold.

    Args:
        reading: the log's reader, which may know its losses and its step by name.
        part: the segment.
        path: the log, for messages.
        loss, step: columns that the user named.

    Raises:
        InputError: no loss column, or several that could be.
    """
    names = list(dict.fromkeys([*part.counts, *part.nulls]))
    if loss is None:
        loss = next((name for name in reading.losses if part.counts[name]), None) or _bare_total(part)
    own_step = reading.step if step is None and reading.step in part.counts else step
    columns = choose_columns(
        [
            n
            for n in names
            if n in (step, reading.step) or not (_stands_still(part, n) or _is_amount(part, n))
        ],
        source=path,
        loss=loss,
        step=own_step,
        counts=part.counts if any(part.counts.values()) else None,
        fractions=part.fractions,
    )
    if STEP not in columns and "epoch" in part.counts and "epoch" not in part.fractions:
        distinct = part.last["epoch"] - part.first["epoch"] + 1
        if part.counts["epoch"] >= part.counts[columns[LOSS]] and (
            part.backward["epoch"] or distinct >= part.counts[columns[LOSS]] > 1
        ):
            columns[STEP] = "epoch"
    if (
        STEP not in columns
        and part.counts[STEP_ABOVE] >= part.counts[columns[LOSS]]
        and part.last_row[STEP_ABOVE] >= part.last_row[columns[LOSS]]
        and not part.backward[STEP_ABOVE]
    ):
        columns[STEP] = STEP_ABOVE
    if STEP not in columns and (counting := _counting(part, columns)) is not None:
        columns[STEP] = counting
    if not part.counts[columns[LOSS]]:
        raise InputError(
            f"{path}: the column {columns[LOSS]!r} holds no values{_others(part, columns[LOSS])}"
        )
    return columns


def _stands_still(part: SegmentColumns, name: str) -> bool:
    """Whether it is named like a counter but does not count: "Train steps: 100" in each line."""
    return counter_of(name) and part.counts[name] > 2 and part.repeated[name] == part.counts[name] - 1


def _is_amount(part: SegmentColumns, name: str) -> bool:
    """Whether it is an amount that varies each time: "steps=21" beside "iter 3"."""
    return (
        _AMOUNT.search(name) is not None
        and part.backward[name] - part.resets[name] > _AMOUNTS * part.counts[name]
        and any(counter_of(n) and not part.backward[n] for n in part.counts if n != name)
    )


def _bare_total(part: SegmentColumns) -> str | None:
    """A ``total`` not called a loss, beside the losses that it adds: never below them, and falling at times."""
    losses = [n for n in part.counts if is_loss(n) and not is_evaluation(n)]
    totals = [n for n in part.counts if _BARE_TOTAL.fullmatch(n)]
    # beside a column called "loss", a total may be the sum since the epoch began
    alone = len(losses) < 2 and any("loss" in n.lower() for n in losses)
    if len(totals) != 1 or not losses or alone or any(_BARE_TOTAL.search(n) for n in losses):
        return None
    total = totals[0]
    of = [n for n in losses if part.counts[n] == part.counts[total]]
    above = all(seen[total] >= seen[n] for seen in (part.first, part.last) for n in of)
    return total if of == losses and above and total in part.fractions and part.backward[total] else None


def _counting(part: SegmentColumns, columns: Mapping[str, str]) -> str | None:
    """A column with another name that counts (``gen 3``, ``round: 12``, ``40/300``): whole numbers that rise in every row."""
    loss = columns[LOSS]
    for name in sorted(part.counts, key=lambda name: _LIKE_STEPS.search(name) is None):
        if (
            part.counts[name] >= max(_NEARLY_ALL * part.counts[loss], 3)
            and part.last_row[name] >= _NEARLY_ALL * part.last_row[loss]
            and name not in (*columns.values(), STEP_ABOVE)
            and name not in part.fractions
            and part.backward[name] == part.resets[name]
            and part.repeated[name] * 4
            <= (part.counts[name] if _LIKE_STEPS.search(name) else 0)  # rows of evaluation
            and (not _CLOCK.search(name) or _is_even(part, name) or _LIKE_STEPS.search(name))
            and math.isfinite(part.last[name])
            and part.first[name] < _A_DATE
        ):
            return name
    return None


def _is_even(part: SegmentColumns, name: str) -> bool:
    """Whether a letter (s=50, t=100) counts steps, not seconds: from 0, 1 or one interval on, at an even interval as far as the
    ends show."""
    interval, rest = divmod(part.last[name] - part.first[name], max(part.counts[name] - 1, 1))
    return len(name) == 1 and not rest and part.counts[name] > _FEW and part.first[name] in (0, 1, interval)


def _others(part: SegmentColumns, loss: str) -> str:
    others = [n for n in part.counts if "loss" in n.lower() and n != loss and not is_evaluation(n)]
    return "; try " + " or ".join(f"--loss {n!r}" for n in others[:6]) if others else ""


def notes_of(part: SegmentColumns, columns: Mapping[str, str]) -> list[str]:
    """What a reader should know about a segment: nulls in one column, a loss that stops, a loss of 0 beside a non-finite norm."""
    loss, norm = columns[LOSS], columns.get(GRADIENT_NORM)
    notes = []
    if part.nulls[loss] and any(part.counts[n] > part.counts[loss] for n in columns.values() if n != loss):
        notes.append(
            f"{loss!r} is null in {part.nulls[loss]:,} rows in which other columns go on: "
            "a store without NaN writes it so"
        )
    counter = columns.get(STEP)
    companions = [n for s, n in columns.items() if s not in (LOSS, STEP) and n in part.last_row]
    if counter and companions:
        silent = min(part.last_row[n] for n in companions) - part.last_row[loss]
        if silent > max(10, 0.02 * part.rows) and not part.nulls[loss]:
            notes.append(f"{loss!r} ceases to be logged while {companions[0]!r} goes on for {silent:,} rows")
    if norm is not None and norm in part.last and not math.isfinite(part.last[norm]) and part.last[loss] == 0:
        notes.append(f"at the end {loss!r} is 0 beside a {norm!r} that is not finite: no recovery")
    return notes

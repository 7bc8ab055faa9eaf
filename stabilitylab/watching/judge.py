"""Judges the rows of one segment as they come: chooses columns, counts steps, feeds the online detector.

``logs`` chooses columns as for a finished log, as soon as there are rows with a loss; loss and step then stay, and signals that
appear later join. While the choice is uncertain (several losses) the judge holds rows, but at most ``PATIENCE`` of them: then the
watch ends with the sentence that ``spikes`` would say.

A step that goes back is a restart of the run; one that falls back to the start of counting begins another run, with a detector of
its own. A rewritten file (Lightning writes its CSV again when a column is added) repeats rows already judged: the judge passes
over them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import STEP
from stabilitylab.logs.reading import Reading
from stabilitylab.logs.rows import Steps
from stabilitylab.logs.segment_columns import STEP_ABOVE, SegmentColumns, columns_of
from stabilitylab.spikes.detector import SpikeDetector
from stabilitylab.spikes.offline import feed
from stabilitylab.telemetry import GRADIENT_NORM, LOSS, Event

PATIENCE = 500
SHOWN = 240


@dataclass(slots=True)
class Curve:
    """The last values of a signal, for the panel."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=SHOWN))
    step: int = -1


class Judge:
    """Judges one segment.

    Args:
        name: the segment's name; "" where the log has only one.
        path: the log's name in messages.
        loss, step: column names that the user gave.
    """

    def __init__(self, name: str, path: Path, *, loss: str | None, step: str | None) -> None:
        self.name, self._path, self._loss, self._step = name, path, loss, step
        self._part = SegmentColumns()
        self._known: set[str] = set()
        self.columns: dict[str, str] = {}
        self._steps = Steps(None)
        self._held: list[Mapping[str, float | None]] = []
        self.detector = SpikeDetector()
        self._first: list[Any] | None = None  # step and loss of the file's first row with a loss
        self._in_file = 0  # rows since the file began
        self._repeated = 0  # rows still to come that a file written anew repeats
        self._at_turn = False
        self.curves = {LOSS: Curve(), GRADIENT_NORM: Curve()}
        self.problem: InputError | None = None
        self.restarts: list[tuple[int, int]] = []  # (step gone back to, step left), since the last look
        self._last_step: int | None = None

    @property
    def piece(self) -> int:
        """The number of the run within the segment."""
        return self._steps.piece

    def turn(self) -> None:
        """Begin the file again."""
        self._at_turn = True

    def take(self, rows: Sequence[Mapping[str, float | None]], reading: Reading) -> list[tuple[int, Event]]:
        """Judge new rows.

        Returns:
            events, each with the number of its run within the segment.
        """
        fresh = False
        for values in rows:
            self._part.add(values)
            if not values.keys() <= self._known:
                self._known |= values.keys()
                fresh = True
        if fresh or not self.columns:
            self._choose(reading)
        if not self.columns:
            self._held = [*self._held, *rows][-PATIENCE:]
            return []
        rows, self._held = [*self._held, *rows], []
        return self._judge(rows)

    def finish(self) -> list[tuple[int, Event]]:
        """End the run."""
        return [(self.piece, event) for event in self.detector.finish()]

    # -----------------------------------------------------------------------------------------------------------

    def _choose(self, reading: Reading) -> None:
        try:
            if self.columns:
                chosen = columns_of(
                    reading, self._part, self._path, loss=self.columns[LOSS], step=self.columns.get(STEP)
                )
                taken = set(self.columns.values())
                self.columns |= {
                    signal: name
                    for signal, name in chosen.items()
                    if signal not in self.columns and signal != STEP and name not in taken
                }
                return
            chosen = columns_of(reading, self._part, self._path, loss=self._loss, step=self._step)
        except InputError as error:
            self.problem = error
            return
        losses = self._part.counts[chosen[LOSS]]
        if STEP not in chosen and losses < 3 and self._known & {"epoch", STEP_ABOVE}:
            return  # the next row will show whether it counts epochs
        counter = chosen.get(STEP)
        whole = "epoch" in self._part.counts and "epoch" not in self._part.fractions and counter != "epoch"
        self._steps = Steps(counter, "epoch" if whole else None)
        self.columns, self.problem = chosen, None

    def _judge(self, rows: Sequence[Mapping[str, float | None]]) -> list[tuple[int, Event]]:
        wanted = {name: signal for signal, name in self.columns.items() if signal != STEP}
        events: list[tuple[int, Event]] = []
        steps: list[int] = []
        held: list[dict[str, float]] = []
        piece = self._steps.piece
        for values in rows:
            row = {wanted[n]: v for n, v in values.items() if n in wanted and v is not None}
            if not row:
                continue
            if self._at_turn and LOSS in row:
                self._begin_file(values, row)
            self._in_file += 1
            if self._repeated:
                self._repeated -= 1
                continue
            if self._first is None and LOSS in row:
                self._first = [self._number(values), row[LOSS]]
            step = self._count(values, row)
            if step is None:
                continue
            if self._steps.piece != piece:
                events += self._fed(piece, steps, held)
                events += [(piece, event) for event in self.detector.finish()]
                steps, held = [], []
                piece = self._steps.piece
                self.detector = SpikeDetector()
                self._last_step = None
            if steps and steps[-1] == step and not held[-1].keys() & row.keys():
                held[-1] |= row
            else:
                steps.append(step)
                held.append(row)
        return [*events, *self._fed(piece, steps, held)]

    def _number(self, values: Mapping[str, float | None]) -> float | None:
        counter = self._steps.counter
        return None if counter is None else values.get(counter)

    def _begin_file(self, values: Mapping[str, float | None], row: Mapping[str, float]) -> None:
        self._at_turn = False
        said = [self._number(values), row[LOSS]]
        if self._first is not None and repr(said) == repr(self._first):  # of two NaNs, too
            self._repeated = self._in_file
        self._first, self._in_file = said, 0

    def _count(self, values: Mapping[str, float | None], row: Mapping[str, float]) -> int | None:
        steps = self._steps
        number = self._number(values)
        if number is not None and not (abs(number) < 2**53):
            return None
        # A store may deliver its second signal after the first has gone on: that is no restart.
        known = number is not None and steps.before is not None and LOSS not in row
        if known and number + steps.offset <= steps.before:  # type: ignore[operator]
            return round(number + steps.offset)  # type: ignore[operator]
        step = steps.take(values)
        if step is None:
            return None
        before, self._last_step = self._last_step, round(step)
        if before is not None and self._last_step < before:
            self.restarts.append((self._last_step, before))
        return self._last_step

    def _fed(
        self, piece: int, steps: Sequence[int], rows: Sequence[Mapping[str, float]]
    ) -> list[tuple[int, Event]]:
        if not rows:
            return []
        signals = dict.fromkeys(name for row in rows for name in row)
        values = {s: np.array([row.get(s, 0.0) for row in rows], dtype=np.float64) for s in signals}
        logged = {s: np.array([s in row for row in rows], dtype=np.bool_) for s in signals}
        for signal, curve in self.curves.items():
            if signal in values:
                curve.values.extend(values[signal][logged[signal]][-SHOWN:].tolist())
                curve.step = steps[-1]
        found = feed(self.detector, np.array(steps, dtype=np.int64), values, logged)
        return [(piece, event) for event in found]

    # -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All state that later verdicts depend on, ready for JSON."""
        part = self._part
        return {
            "part": {
                "rows": part.rows,
                "counts": dict(part.counts),
                "nulls": dict(part.nulls),
                "fractions": sorted(part.fractions),
                "last": part.last,
                "first": part.first,
                "backward": dict(part.backward),
                "last_row": part.last_row,
                "filtered": part.filtered,
            },
            "columns": self.columns,
            "steps": self._steps.to_json(),
            "held": [dict(row) for row in self._held],
            "detector": self.detector.state_dict(),
            "first": self._first,
            "in_file": self._in_file,
            "repeated": self._repeated,
            "at_turn": self._at_turn,
            "last_step": self._last_step,
            "curves": {name: [list(curve.values), curve.step] for name, curve in self.curves.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        saved = dict(state["part"])
        counters: dict[str, Any] = {name: Counter(saved[name]) for name in ("counts", "nulls", "backward")}
        self._part = SegmentColumns(**{**saved, **counters, "fractions": set(saved["fractions"])})
        self._known = {*self._part.counts, *self._part.nulls}
        self.columns = dict(state["columns"])
        self._steps = Steps(**state["steps"])
        self._held = list(state["held"])
        self.detector.load_state_dict(state["detector"])
        self._first, self._in_file = state["first"], state["in_file"]
        self._repeated, self._at_turn = state["repeated"], state["at_turn"]
        self._last_step = state["last_step"]
        for name, (values, step) in state["curves"].items():
            self.curves[name].values.extend(values)
            self.curves[name].step = step

"""The new rows of a log since the last look, by kind of log.

    TextFollower       text of any format known to ``logs``: reads only the appended bytes
    DocumentFollower   files written as a whole each time (``trainer_state.json``, Parquet, compressed text): reads one again
                       when it has changed, and hands over only the rows beyond those of last time
    stores.py          TensorBoard, W&B, MLflow, trackio, run folders

The watch asks a follower again and again. Its ``state`` says, as JSON, where it stands.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from stabilitylab.errors import InputError
from stabilitylab.logs.binary import NoLogError
from stabilitylab.logs.column_names import STEP, may_be_loss
from stabilitylab.logs.reading import LinePieces, Reading, Row
from stabilitylab.logs.recognise import open_logs, reading_of
from stabilitylab.logs.source import LogFile
from stabilitylab.telemetry import Event
from stabilitylab.watching.tail import Tail

BATCH = 50_000
# The watch examines a text first taken for "any trainer's" again until it has given this many rows.
_PROBATION = 20
_LOOKED = 1000  # rows without a loss, after which the format is no longer in doubt


@dataclass(slots=True)
class NewRows:
    """The result of one look.

    Attributes:
        rows: in the order of the log.
        events: events that the run's own monitor recorded.
        turn: "rotated" or "truncated" where the file began again before these rows; "" where it did not.
        anew: forget all rows before, which were read in a wrong format.
    """

    rows: list[Row] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    turn: str = ""
    anew: bool = False


class Follower(Protocol):
    """Gives what is new.

    Attributes:
        reading: format, step and losses of the log.
        state: where it stands, ready for JSON.
    """

    reading: Reading

    @property
    def state(self) -> dict[str, Any]: ...

    def poll(self, *, last: bool = False) -> Iterator[NewRows]:
        """The new rows since the last call. ``last``: this is the last call."""

    def changed(self) -> float | None:
        """When the log last changed, in seconds since 1970; None: it does not exist."""

    def close(self) -> None:
        """Close open files."""


class TextFollower:
    """Text that grows.

    Args:
        path: the file.
        reading: the file's reader (``growing_text``).
        pattern: as ``--pattern``.
        state: of an earlier follower.
    """

    def __init__(
        self, path: Path, reading: Reading, pattern: str | None, state: dict[str, Any] | None = None
    ) -> None:
        self.path, self._pattern = path, pattern
        self._tail = Tail(path, state["tail"] if state else None)
        self._rows = (
            state["rows"] if state else 0
        )  # from the first that names a loss on: settings may stand above
        self._looked = 0
        self._pieces: LinePieces | None = None
        self._saved = state
        self.reading = reading
        if state and reading.format != state["format"]:
            # The log was rotated and the new file's beginning looks different: the known format counts.
            self._saved, self._tail, self._rows = None, Tail(path), 0
        self._make_pieces()

    @property
    def state(self) -> dict[str, Any]:
        assert self._pieces is not None
        return {
            "tail": self._tail.state,
            "pieces": self._pieces.state,
            "rows": self._rows,
            "format": self.reading.format,
        }

    def changed(self) -> float | None:
        return _modified(self.path)

    def close(self) -> None:
        self._tail.close()

    def poll(self, *, last: bool = False) -> Iterator[NewRows]:
        batch = NewRows()
        for piece in self._tail.read(unfinished=last):
            if isinstance(piece, str):
                batch.rows += self._end()
                if batch.rows:
                    yield batch
                batch = NewRows(turn=piece)
                self._look_again()
                continue
            doubtful = self._rows < (_PROBATION if self.reading.format == "text" else 1)
            if doubtful and self._is_another():
                yield NewRows(anew=True)
                yield from self.poll(last=last)
                return
            assert self._pieces is not None
            rows = self._pieces.take(piece)
            while some := list(islice(rows, BATCH)):
                self._looked += len(some)
                if self._looked > _LOOKED or any(may_be_loss(n) for _, values in some for n in values):
                    self._rows += len(some)
                batch.rows += some
                yield batch
                batch = NewRows()
        if last:
            batch.rows += self._end()
        if batch.rows or batch.turn:
            yield batch

    def flush(self) -> Iterator[NewRows]:
        """The rows held back for lines that have not come, as the log has been still for a while."""
        if rows := self._end():
            yield NewRows(rows)

    def _end(self) -> list[Row]:
        assert self._pieces is not None
        return list(self._pieces.end())

    def _make_pieces(self) -> None:
        assert self.reading.pieces is not None
        self._pieces = self.reading.pieces()
        if self._saved is not None:
            self._pieces.state = self._saved["pieces"]
            self._saved = None

    def _look_again(self) -> None:
        """Recognise a new file's format, which may differ; take an empty one for the same."""
        try:
            found = reading_of(self.path, self._pattern)
        except (InputError, OSError):
            found = None
        if found is not None and found.pieces is not None:
            self.reading = found
        self._make_pieces()

    def _is_another(self) -> bool:
        try:
            found = reading_of(self.path, self._pattern)
        except (InputError, OSError):
            return False
        if found is None or found.pieces is None or found.format == self.reading.format:
            return False
        self._tail.close()
        self.reading, self._rows, self._tail = found, 0, Tail(self.path)
        self._make_pieces()
        return True


class DocumentFollower:
    """Follows a file written as a whole each time.

    Args:
        path: the file.
        options: ``loss``, ``step`` and ``pattern`` for reading it.
        state: of an earlier follower.
    """

    def __init__(
        self, path: Path, options: dict[str, str | None], state: dict[str, Any] | None = None
    ) -> None:
        self.path, self._options = path, options
        self._given: Counter[str] = Counter(state["given"] if state else {})
        self._first: dict[str, list[Any]] = state["first"] if state else {}
        self._stamp: list[int] | None = state["stamp"] if state else None
        self._failed_since: float | None = None
        self.reading = Reading(format="document", rows=lambda: iter(()))

    @property
    def state(self) -> dict[str, Any]:
        return {"given": dict(self._given), "first": self._first, "stamp": self._stamp}

    def changed(self) -> float | None:
        return _modified(self.path)

    def close(self) -> None:
        """Nothing to close."""

    def poll(self, *, last: bool = False) -> Iterator[NewRows]:
        try:
            found = self.path.stat()
        except OSError:
            return
        stamp = [found.st_ino, found.st_size, found.st_mtime_ns]
        if stamp == self._stamp:
            return
        try:
            rows = list(self._all())
        except (InputError, OSError) as error:  # half written: the next look finds it whole
            self._failed_since = self._failed_since or time.monotonic()
            if isinstance(error, NoLogError):
                raise
            if last or time.monotonic() - self._failed_since > 60:
                raise InputError(str(error)) from None
            return
        self._stamp, self._failed_since = stamp, None
        batch, count, begun = NewRows(), Counter[str](), set[str]()
        for part, values in rows:
            if part not in begun:
                begun.add(part)
                first = sorted((k, v) for k, v in values.items() if v is not None and v == v)
                said = [list(pair) for pair in first]
                if self._first.get(part, said) != said:
                    batch.turn, self._given[part] = "truncated", 0
                self._first[part] = said
            count[part] += 1
            if count[part] > self._given[part]:
                batch.rows.append((part, values))
        for part in begun:
            if count[part] < self._given[part]:
                batch.turn = "truncated"
            self._given[part] = count[part]
        if batch.rows or batch.turn:
            yield batch

    def _all(self) -> Iterator[Row]:
        reading = reading_of(self.path, self._options["pattern"])
        if reading is not None:
            self.reading = reading
            yield from reading.rows()
            return
        loss, step, pattern = (self._options[name] for name in ("loss", "step", "pattern"))
        for log in open_logs([self.path], loss=loss, step=step, pattern=pattern):
            self.reading = Reading(format=log.format, rows=lambda: iter(()), step=STEP)
            yield from rows_of(log)


def rows_of(log: Any) -> Iterator[Row]:
    """A log's blocks as rows under the log's own names, steps as ``step``."""
    for block in log.blocks():
        columns = [
            (log.columns[signal], values.tolist(), block.logged[signal].tolist())
            for signal, values in block.values.items()
        ]
        for i, step in enumerate(block.steps.tolist()):
            values = {name: values[i] for name, values, logged in columns if logged[i]}
            yield log.name, {**values, STEP: float(step)}


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def growing_text(path: Path, pattern: str | None) -> Reading | None:
    """The reader of a text that grows line by line; None: it is compressed, in UTF-16, or a document.

    Raises:
        InputError: it cannot be understood.
    """
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff") or LogFile(path).compression is not None:
            return None
    found = reading_of(path, pattern)
    return found if found is not None and found.pieces is not None else None

"""The new rows of a tracker's store or a run folder, read from where the last look ended.

TensorBoard    event files are records of (length, checksum, content, checksum); each directory under the folder is a
               run, those of evaluation are left out
W&B, offline   LevelDB's log, as ``logs.trackers`` reads it
MLflow         SQLite by row number; files of metrics by their offset
trackio        SQLite by id
run folder     ``events.jsonl`` by its offset; of the telemetry only steps after the last one
"""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import STEP, is_evaluation
from stabilitylab.logs.json_lines import numbers
from stabilitylab.logs.pattern import LineValues, number
from stabilitylab.logs.reading import Reading, Row
from stabilitylab.logs.records import RUN_SIGNALS
from stabilitylab.logs.tensorboard import event_files, scalars, suffix_of
from stabilitylab.logs.trackers import connected, history, infinite, mlflow_name, mlflow_runs, unwrapped
from stabilitylab.telemetry import LOSS, Event, Key
from stabilitylab.watching.followers import NewRows
from stabilitylab.watching.tail import Tail

_BLOCK, _HEADER = 32768, 7


def by_step(rows: list[Row]) -> list[Row]:
    """Values that a store holds one by one, as rows: joined by part and step; a value logged twice gives two rows."""
    joined: dict[tuple[str, float, int], LineValues] = {}
    seen: dict[tuple[str, str, float], int] = {}
    for part, values in rows:
        step = values[STEP] or 0.0
        for name, value in values.items():
            if name != STEP:
                turn = seen[part, name, step] = seen.get((part, name, step), -1) + 1
                joined.setdefault((part, step, turn), {STEP: step})[name] = value
    return [(key[0], joined[key]) for key in sorted(joined)]


class _Store:
    """The base of followers of stores."""

    def __init__(self, path: Path, form: str, state: dict[str, Any] | None) -> None:
        self.path = path
        self.reading = Reading(format=form, rows=lambda: iter(()), step=STEP)
        self.state: dict[str, Any] = state or {}

    def files(self) -> list[Path]:
        """The files that change when something is logged."""
        return [self.path]

    def close(self) -> None:
        """Nothing to close: no file stays open between looks."""

    def changed(self) -> float | None:
        times = []
        for file in self.files():
            try:
                times.append(file.stat().st_mtime)
            except OSError:
                continue
        return max(times, default=None)


class TensorBoardFollower(_Store):
    """The event files in and under a folder, or one of them."""

    def __init__(self, path: Path, state: dict[str, Any] | None = None) -> None:
        super().__init__(path, "TensorBoard", state)
        self.state.setdefault("files", {})

    def files(self) -> list[Path]:
        return event_files(self.path)

    def poll(self, *, last: bool = False) -> Iterator[NewRows]:
        found: dict[str, list[list[Row]]] = {}
        for file in self.files():
            offset = self.state["files"].get(str(file), 0)
            try:
                if file.stat().st_size <= offset:
                    continue
                with file.open("rb") as opened:
                    opened.seek(offset)
                    content = opened.read()
            except OSError:
                continue
            part = self._part(file)
            used, events = _records(content)
            self.state["files"][str(file)] = offset + used
            if part is not None and events:
                rows: list[Row] = [(part, {STEP: float(step), **values}) for step, values in events]
                found.setdefault(part, []).append(rows)
        together = [row for files in found.values() for row in _joined(files)]
        if together:
            yield NewRows(together)

    def _part(self, file: Path) -> str | None:
        inside = file.parent.relative_to(self.path).as_posix() if self.path.is_dir() else "."
        name = f"{'' if inside == '.' else inside} {suffix_of(file)}".strip()
        return None if is_evaluation(name) else name


def _joined(files: list[list[Row]]) -> list[Row]:
    """Join files: those of different tags were written side by side; of those with a common tag, the later continues the
    earlier."""
    tags = [{name for _, values in rows for name in values if name != STEP} for rows in files]
    rows = [row for file in files for row in file]
    if len(files) > 1 and all(a.isdisjoint(b) for a, b in itertools.combinations(tags, 2)):
        return by_step(rows)
    return rows


def _records(content: bytes) -> tuple[int, list[tuple[int, LineValues]]]:
    """The length of the whole records in bytes, and their scalars, those of one step together."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event as Record

    at, found = 0, list[tuple[int, LineValues]]()
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        end = at + 12 + length + 4
        if end > len(content):
            break
        record = Record()
        try:
            record.ParseFromString(content[at + 12 : end - 4])
        except DecodeError:
            raise InputError("a TensorBoard event file is damaged: its records are no events") from None
        at = end
        values = {
            tag: value for tag, value in scalars(record) if not tag.startswith(("hparam/", "_hparams_"))
        }
        if not values:
            continue
        if found and found[-1][0] == record.step and not found[-1][1].keys() & values.keys():
            found[-1][1].update(values)
        else:
            found.append((record.step, dict(values)))
    return at, found


class WandbFollower(_Store):
    """Follows histories of offline runs, which grow record by record."""

    def __init__(self, path: Path, files: list[Path], state: dict[str, Any] | None = None) -> None:
        super().__init__(path, "W&B offline run", state)
        self.reading.step = None
        self._files = files
        self.state.setdefault("files", {})

    def files(self) -> list[Path]:
        return self._files

    def poll(self, *, last: bool = False) -> Iterator[NewRows]:
        batch = NewRows()
        for file in self._files:
            begin = self.state["files"].get(str(file), _HEADER)
            try:
                with file.open("rb") as opened:
                    opened.seek(begin)
                    content = opened.read()
            except OSError:
                continue
            part = file.stem if len(self._files) > 1 else ""
            at, pieces, done = begin, b"", begin
            while at + _HEADER <= begin + len(content):
                room = _BLOCK - at % _BLOCK
                i = at - begin
                length, kind = int.from_bytes(content[i + 4 : i + 6], "little"), content[i + 6]
                if room < _HEADER or (
                    kind == 0 and length == 0 and room < _BLOCK and at + room < begin + len(content)
                ):
                    at += room
                    continue
                body = content[i + _HEADER : i + _HEADER + length]
                if len(body) < length or kind not in (1, 2, 3, 4):
                    break
                at += _HEADER + length
                pieces = body if kind in (1, 2) else pieces + body
                if kind in (1, 4):
                    done = at
                    if values := history(pieces):
                        batch.rows.append((part, values))
            self.state["files"][str(file)] = done
        if batch.rows:
            yield batch


class SqliteFollower(_Store):
    """MLflow's or trackio's database."""

    def __init__(self, path: Path, state: dict[str, Any] | None = None) -> None:
        super().__init__(path, "", state)
        with closing(connected(path)) as database:
            columns = {row[1] for row in database.execute('PRAGMA table_info("metrics")')}
        if {"run_uuid", "key", "value", "step"} <= columns:
            self.reading.format, self._rows, self._number = "MLflow SQLite", self._mlflow, "rowid"
        elif {"run_name", "step", "metrics"} <= columns:
            self.reading.format, self._rows, self._number = "trackio", self._trackio, "id"
            self.reading.step = None
        else:
            raise InputError(
                f"{path} is a SQLite database, but not MLflow's or trackio's: export the run as CSV"
            )
        self.state.setdefault("row", 0)

    def files(self) -> list[Path]:
        return [self.path, self.path.with_name(self.path.name + "-wal")]

    def poll(self, *, last: bool = False) -> Iterator[NewRows]:
        turn = ""
        try:
            with closing(connected(self.path)) as database:
                (highest,) = database.execute(f"SELECT max({self._number}) FROM metrics").fetchone()
                if (highest or 0) < self.state["row"]:  # another database has taken its place
                    self.state["row"], turn = 0, "truncated"
                rows, row = self._rows(database)
        except sqlite3.DatabaseError:  # locked, or being replaced: leave it to the next look
            return
        self.state["row"] = row
        if rows or turn:
            yield NewRows(rows, turn=turn)

    def _mlflow(self, database: sqlite3.Connection) -> tuple[list[Row], int]:
        names = {}
        rows: list[Row] = []
        read = self.state["row"]
        try:
            names = dict(database.execute("SELECT run_uuid, name FROM runs"))
        except sqlite3.DatabaseError:
            names = {}
        for row, run, key, step, value, bad in database.execute(
            "SELECT rowid, run_uuid, key, step, value, is_nan FROM metrics WHERE rowid > ? ORDER BY rowid",
            (self.state["row"],),
        ):
            read = row
            part = f"{names[run]} ({run[:8]})" if names.get(run) else run
            rows.append((part, {STEP: float(step), key: math.nan if bad else infinite(float(value))}))
        return by_step(rows), read

    def _trackio(self, database: sqlite3.Connection) -> tuple[list[Row], int]:
        rows: list[Row] = []
        read = self.state["row"]
        for row, run, step, blob in database.execute(
            "SELECT id, run_name, step, metrics FROM metrics WHERE id > ? ORDER BY id", (self.state["row"],)
        ):
            read = row
            try:
                values = numbers(unwrapped(json.loads(blob)))
            except (ValueError, TypeError):
                self.reading.left_out["rows that are not JSON"] += 1
                continue
            rows.append((str(run), {**values, STEP: float(step)}))
        return rows, read


class MlflowFilesFollower(_Store):
    """MLflow's file store: one growing file per metric."""

    def __init__(self, path: Path, state: dict[str, Any] | None = None) -> None:
        super().__init__(path, "MLflow file store", state)
        self._tails: dict[str, Tail] = {}
        self.state.setdefault("tails", {})

    def files(self) -> list[Path]:
        return [run / "metrics" for run in mlflow_runs(self.path)] + self._metrics()

    def _metrics(self) -> list[Path]:
        return [
            f for run in mlflow_runs(self.path) for f in sorted((run / "metrics").rglob("*")) if f.is_file()
        ]

    def poll(self, *, last: bool = False) -> Iterator[NewRows]:
        rows: list[Row] = []
        for run in mlflow_runs(self.path):
            folder, part = run / "metrics", mlflow_name(run)
            for file in sorted(one for one in folder.rglob("*") if one.is_file()):
                tail = self._tails.setdefault(str(file), Tail(file, self.state["tails"].get(str(file))))
                name = file.relative_to(folder).as_posix()
                for piece in tail.read(unfinished=last):
                    if isinstance(piece, bytes):
                        rows += [(part, {STEP: s, name: v}) for s, v in _mlflow_lines(piece)]
                tail.close()  # there may be hundreds
                self.state["tails"][str(file)] = tail.state
        if rows := by_step(rows):
            yield NewRows(rows)


def _mlflow_lines(piece: bytes) -> Iterator[tuple[float, float]]:
    for line in piece.decode("utf-8", errors="replace").splitlines():
        words = line.split()
        value = number(words[1]) if len(words) >= 2 else None
        step = number(words[2]) if len(words) >= 3 else 0.0
        if value is not None and step is not None:
            yield step, value


class RunFollower(_Store):
    """A run folder: its monitor's events, and the loss and its companions."""

    def __init__(self, path: Path, loss: str | None = None, state: dict[str, Any] | None = None) -> None:
        super().__init__(path, "stabilitylab run folder", state)
        self._loss = loss or LOSS
        self._events = Tail(path / "events.jsonl", self.state.get("events"))
        self.reading.losses = (self._loss,)
        self.state.setdefault("step", -1)
        self.state.setdefault("telemetry", None)

    def files(self) -> list[Path]:
        return [self.path / "events.jsonl", self.path / "telemetry"]

    def poll(self, *, last: bool = False) -> Iterator[NewRows]:
        batch = NewRows()
        for piece in self._events.read():
            if isinstance(piece, bytes):
                batch.events += _events(piece)
        self._events.close()
        self.state["events"] = self._events.state
        for event in batch.events:
            if event.kind == "rewind":
                self.state["step"] = min(self.state["step"], event.step - 1)
        if batch.events:  # before reading telemetry: these will not be read again
            yield batch
        folder = self.path / "telemetry"
        if not folder.is_dir():
            return
        stamp = [folder.stat().st_mtime_ns, len(list(folder.glob("*.parquet")))]
        if stamp != self.state["telemetry"]:
            rows = list(self._new_rows())
            self.state["telemetry"] = stamp
            if rows:
                yield NewRows(rows)

    def _new_rows(self) -> Iterator[Row]:
        from stabilitylab.runs import load_run

        run = load_run(self.path)
        wanted = dict.fromkeys((self._loss, *RUN_SIGNALS))
        joined: dict[int, LineValues] = {}
        for metric in wanted:
            key = Key.parse(metric)
            rows = run.near(key.family, key.statistic, self.state["step"] + 1, 1 << 62)
            rows = rows[rows["site"] == key.site]
            for step, value in zip(rows["step"].tolist(), rows["value"].tolist(), strict=True):
                joined.setdefault(step, {STEP: float(step)})[metric] = value
        for step in sorted(joined):
            yield "", joined[step]
        self.state["step"] = max([self.state["step"], *joined])


def is_abandoned(follower: object) -> bool:
    """Whether a run folder's writer has died without an end event."""
    if not isinstance(follower, RunFollower):
        return False
    from stabilitylab.runs.folder import RunFolder  # imports pandas

    return RunFolder(follower.path).is_being_written() is False


def _events(piece: bytes) -> Iterator[Event]:
    for line in piece.decode("utf-8", errors="replace").splitlines():
        try:
            event = Event.from_json(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short by a kill; the run's own readers say so
        if isinstance(event.data, Mapping) and isinstance(event.step, int):
            yield event

"""Stores of experiment trackers, read without the tracker.

    MLflow, files     mlruns/EXPERIMENT/RUN/metrics/NAME: ``timestamp value step`` a line
                      (mlflow/store/tracking/file_store.py, 3.17)
    MLflow, SQLite    table metrics (key, value, step, is_nan, run_uuid) (mlflow/store/tracking/dbmodels/models.py, 3.17)
    trackio           SQLite, table metrics (run_name, step, metrics: JSON) (trackio/sqlite_storage.py, 0.43)
    W&B, offline      run-ID.wandb: LevelDB's log format around protobuf records
                      (wandb/sdk/internal/datastore.py, wandb/proto/wandb_internal.proto, 0.31)

The reader opens databases read-only. It decodes only a W&B record's history, by its field numbers (Record.history = 2,
HistoryRecord.item = 1, HistoryItem.key = 1, nested_key = 2, value_json = 16), so no generated code is needed.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from stabilitylab.errors import InputError
from stabilitylab.logs.json_lines import numbers
from stabilitylab.logs.pattern import LineValues, number
from stabilitylab.logs.reading import Reading, Row
from stabilitylab.logs.source import LogFile

SQLITE = b"SQLite format 3\x00"
WANDB = b":W&B"
_BLOCK, _HEADER = 32768, 7
_LARGEST = 3.4028234e38  # MLflow's SQLite holds infinities as the largest float


# --------------------------------------------------------------------------------------------------- MLflow, files


def mlflow_runs(folder: Path) -> list[Path]:
    """The runs of a file store in and under ``folder``: folders with a ``metrics`` folder."""
    return sorted(
        found.parent
        for depth in ("metrics", "*/metrics", "*/*/metrics", "mlruns/*/*/metrics")
        for found in folder.glob(depth)
        if found.is_dir() and any(one.is_file() for one in found.rglob("*"))
    )


def read_mlflow_files(folder: Path) -> Reading:
    """Each run as a part, its metrics joined by step."""

    def rows() -> Iterator[Row]:
        reading.left_out.clear()
        runs = mlflow_runs(folder)
        for run in runs:
            name = mlflow_name(run) if len(runs) > 1 else ""
            yield from _by_step(name, _mlflow_values(run / "metrics", reading))

    reading = Reading(format="MLflow file store", rows=rows, step="step")
    return reading


def read_mlflow_metric(file: Path) -> Reading:
    """One metric's file, taken for the loss whatever its name."""

    def rows() -> Iterator[Row]:
        reading.left_out.clear()
        yield from _by_step("", _mlflow_values(file.parent, reading, [file]))

    reading = Reading(format="MLflow metric", rows=rows, step="step", losses=(file.name,))
    return reading


def mlflow_name(run: Path) -> str:
    """A run's display name, and the beginning of its id."""
    meta = run / "meta.yaml"
    if meta.is_file():
        for line in meta.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("run_name:") and (name := line.partition(":")[2].strip().strip("'\"")):
                return f"{name} ({run.name[:8]})"
    return run.name


def _mlflow_values(
    folder: Path, reading: Reading, files: Sequence[Path] | None = None
) -> Iterator[tuple[str, float, float]]:
    for file in files or sorted(one for one in folder.rglob("*") if one.is_file()):
        name = file.relative_to(folder).as_posix()
        for count, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines()):
            words = line.split()
            value = number(words[1]) if len(words) >= 2 else None
            step = number(words[2]) if len(words) >= 3 else float(count)  # MLflow before 1.0 had no steps
            if value is None or step is None:
                reading.damage(
                    "lines of a metric", f"metric {name!r}: {line[:40]!r} is not 'timestamp value step'"
                )
                continue
            yield name, step, value


def _by_step(part: str, values: Iterator[tuple[str, float, float]]) -> Iterator[Row]:
    """Metrics stored one after the other, as rows; a step logged twice gives two rows."""
    rows: dict[tuple[float, int], LineValues] = {}
    seen: dict[tuple[str, float], int] = {}
    for name, step, value in values:
        turn = seen[name, step] = seen.get((name, step), -1) + 1
        rows.setdefault((step, turn), {"step": step})[name] = value
    for key in sorted(rows):
        yield part, rows[key]


# ------------------------------------------------------------------------------------------------ SQLite


def read_sqlite(source: LogFile) -> Reading:
    """MLflow's or trackio's database.

    Raises:
        InputError: the database is another program's.
    """
    path = source.on_disk()
    try:
        with closing(connected(path)) as database:
            tables = {
                name: {row[1] for row in database.execute(f'PRAGMA table_info("{name}")')}
                for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            }
    except sqlite3.DatabaseError as error:
        raise InputError(f"{source.name} is a SQLite database that cannot be read: {error}") from None
    columns = tables.get("metrics", set())
    if {"run_uuid", "key", "value", "step"} <= columns:
        reading = Reading(format="MLflow SQLite", rows=lambda: _mlflow_rows(path), step="step")
    elif {"run_name", "step", "metrics"} <= columns:
        # trackio's own step counts calls; train/global_step, which a Trainer logs beside it, counts updates.
        reading = Reading(format="trackio", rows=lambda: _trackio_rows(path, reading))
    else:
        named = ", ".join(sorted(tables)[:8]) or "none"
        raise InputError(
            f"{source.name} is a SQLite database, but not MLflow's or trackio's (its tables are {named}): "
            "export the run as CSV"
        )
    return reading


def connected(path: Path) -> sqlite3.Connection:
    """A connection to a database, for reading only."""
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)


def _mlflow_rows(path: Path) -> Iterator[Row]:
    with closing(connected(path)) as database:
        runs = database.execute("SELECT DISTINCT run_uuid FROM metrics ORDER BY run_uuid").fetchall()
        names: dict[str, str] = {}
        try:
            names = dict(database.execute("SELECT run_uuid, name FROM runs"))
        except sqlite3.DatabaseError:
            names = {}
        for (run,) in runs:
            found = database.execute(
                "SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY step, timestamp",
                (run,),
            )
            values = (
                (key, float(step), math.nan if bad else infinite(float(value)))
                for key, step, value, bad in found
            )
            name = f"{names[run]} ({run[:8]})" if names.get(run) else run
            yield from _by_step(name if len(runs) > 1 else "", values)


def infinite(value: float) -> float:
    """The value, with infinity for the largest float."""
    return math.copysign(math.inf, value) if abs(value) >= _LARGEST else value


def _trackio_rows(path: Path, reading: Reading) -> Iterator[Row]:
    reading.left_out.clear()
    with closing(connected(path)) as database:
        several = database.execute("SELECT COUNT(DISTINCT run_name) FROM metrics").fetchone()[0] > 1
        for run, step, blob in database.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY run_name, id"
        ):
            try:
                record = json.loads(blob)
            except (ValueError, TypeError):
                reading.damage(
                    "rows that are not JSON", f"run {run!r}, step {step}: the metrics are not JSON"
                )
                continue
            yield (str(run) if several else ""), {**numbers(unwrapped(record)), "step": float(step)}


def unwrapped(record: Any) -> dict[str, Any]:
    """The record if it is an object, else {}; {"_type": "trackio.infinity"...} and strings, for what JSON lacks, stay."""
    return record if isinstance(record, dict) else {}


# -------------------------------------------------------------------------------------------------- W&B


def read_wandb(sources: list[LogFile]) -> Reading:
    """The histories of offline runs, each as a part."""

    def rows() -> Iterator[Row]:
        reading.left_out.clear()
        for source in sources:
            part = source.path.stem if len(sources) > 1 else ""
            for record in leveldb_records(source, reading):
                values = history(record)
                if values:
                    yield part, values

    reading = Reading(format="W&B offline run", rows=rows)
    return reading


def leveldb_records(source: LogFile, reading: Reading) -> Iterator[bytes]:
    """The records of LevelDB's log: blocks of 32 KiB; a record is checksum (4 bytes), length (2), type (1: whole, 2-4: pieces)."""
    data = b"".join(source.chunks())
    at, pieces = _HEADER, b""
    while at + _HEADER <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < _HEADER:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0 and length == 0:
            at += room
            continue
        body = data[at + _HEADER : at + _HEADER + length]
        if len(body) < length or kind not in (1, 2, 3, 4):
            reading.left_out["a last record cut short"] += 1
            return
        at += _HEADER + length
        pieces = body if kind in (1, 2) else pieces + body
        if kind in (1, 4):
            yield pieces


def history(record: bytes) -> LineValues:
    """A W&B record's part of the history; empty for another kind of record."""
    values: dict[str, Any] = {}
    for field, body in fields(record):
        if field != 2 or not isinstance(body, bytes):
            continue
        for item, content in fields(body):
            if item != 1 or not isinstance(content, bytes):
                continue
            key, nested, text = "", [], b"null"
            for inner, value in fields(content):
                if not isinstance(value, bytes):
                    continue
                if inner == 1:
                    key = value.decode("utf-8", errors="replace")
                elif inner == 2:
                    nested.append(value.decode("utf-8", errors="replace"))
                elif inner == 16:
                    text = value
            try:
                values[key or "/".join(nested)] = json.loads(text)
            except ValueError:
                continue
    return numbers(values)


def fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Field numbers and contents of a protobuf message; numbers of fixed width as their bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield field, value
        elif kind == 2:
            size, at = _varint(message, at)
            yield field, message[at : at + size]
            at += size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            yield field, message[at : at + size]
            at += size
        else:
            return


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, at

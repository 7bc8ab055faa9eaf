"""swanlab's ``run-ID.swanlab``: a LevelDB log, like W&B's, around protobuf records of its own.

    Record.scalar = 13: key = 1, step = 2 (absent: 0), value = 5: number = 1 (a double; absent: 0)

Offline runs (``mode="offline"``) and synchronised ones both write it. The format follows files that swanlab 0.10.3 wrote and its
``swanlab/proto``; the reader decodes only scalars, so it needs no generated code. 0.6 kept JSON in it and called it
``backup.swanlab`` (seen in files that 0.6.12 wrote):

    {"model_type": "Scalar", "data": {"metric": {"index": 5, "data": 2.3}, "key": "loss", "step": 5}}
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

from stabilitylab.logs.pattern import LineValues
from stabilitylab.logs.pattern import number as as_number
from stabilitylab.logs.reading import Reading, Row
from stabilitylab.logs.source import LogFile
from stabilitylab.logs.trackers import fields, leveldb_records

SWANLAB = b":SWL"
_RECORD_SCALAR, _KEY, _STEP, _VALUE = 13, 1, 2, 5


def read_swanlab(sources: list[LogFile]) -> Reading:
    """Each file as a part, and each logging call as a row."""

    def rows() -> Iterator[Row]:
        reading.left_out.clear()
        for source in sources:
            name = source.path.parent.name if source.path.stem == "backup" else source.path.stem
            part = name if len(sources) > 1 else ""
            row: LineValues = {}
            for record in leveldb_records(source, reading):
                found = scalar(record)
                if found is None:
                    continue
                key, step, value = found
                if row and (row["step"] != step or key in row):
                    yield part, row
                    row = {}
                row |= {"step": step, key: value}
            if row:
                yield part, row

    reading = Reading(format="swanlab", rows=rows, step="step")
    return reading


def scalar(record: bytes) -> tuple[str, float, float] | None:
    """Key, step and value of a record; None for another kind of record."""
    if record.startswith(b"{"):
        return _json_scalar(record)
    for number, body in fields(record):
        if number != _RECORD_SCALAR or not isinstance(body, bytes):
            continue
        key, step, value = "", 0.0, None
        for inner, content in fields(body):
            if inner == _KEY and isinstance(content, bytes):
                key = content.decode("utf-8", errors="replace")
            elif inner == _STEP and isinstance(content, int):
                step = float(content)
            elif inner == _VALUE and isinstance(content, bytes):
                value = 0.0
                for _, said in fields(content):
                    if isinstance(said, bytes) and len(said) == 8:
                        (value,) = struct.unpack("<d", said)
        if key and value is not None:
            return key, step, value
    return None


def _json_scalar(record: bytes) -> tuple[str, float, float] | None:
    try:
        said = json.loads(record)
        if said["model_type"] != "Scalar":
            return None
        value = as_number(str(said["data"]["metric"]["data"]))
        return None if value is None else (str(said["data"]["key"]), float(said["data"]["step"]), value)
    except (ValueError, KeyError, TypeError):
        return None

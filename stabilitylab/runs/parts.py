"""Telemetry on disk: a folder of complete Parquet files, and the rules by which their rows still stand.

Every file ``part-NNNNNN.parquet`` appears by renaming a finished ``*.tmp``, so any file of that name from a killed run is readable.
Numbers grow, and no name is used twice. A file's footer (the key ``stabilitylab`` of the schema's metadata, as JSON) says how it
relates to the others:

    segment     history this file belongs to: 0 at first, one more for each ``rewind`` and for each reopening
    from_step   step from which this segment rewrote history (null in segment 0)
    level       0 as written, higher when merged from files of the level below
    replaces    names of the files this one was merged from

Two rules keep readers correct after any crash, without a journal:

    a row of segment k stands  <=>  step < min(from_step of every later segment)
    a file counts              <=>  no other file of the folder replaces it

The second covers a kill between renaming a merged file and deleting its sources.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stabilitylab.errors import InputError

PATTERN = "part-*.parquet"
ROW_GROUP = 131_072
_WORDS = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("family", _WORDS),
        ("site", _WORDS),
        ("statistic", _WORDS),
        ("index", pa.int32()),
        ("value", pa.float64()),
    ]
)
_METADATA_KEY = b"stabilitylab"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One finished file of a telemetry folder."""

    path: Path
    segment: int
    rows: int
    from_step: int | None = None
    level: int = 0
    replaces: tuple[str, ...] = field(default=())

    @property
    def number(self) -> int:
        return int(self.path.stem.partition("-")[2])


def list_parts(folder: Path, *, warn: bool = True) -> list[Part]:
    """The files of a folder that count, oldest first.

    Warns of files that a killed run left half written. Raises InputError for an unreadable finished file.
    """
    for temporary in sorted(folder.glob("*.tmp")) if warn else ():
        warnings.warn(f"{temporary} was left half written by a killed run and is not read", stacklevel=2)
    for _ in range(5):
        try:
            parts = [_read_footer(path) for path in sorted(folder.glob(PATTERN))]
        except FileNotFoundError:  # a running sink merged and deleted it between the two calls
            continue
        replaced = {name for part in parts for name in part.replaces}
        return sorted((p for p in parts if p.path.name not in replaced), key=lambda part: part.number)
    raise InputError(f"{folder} changes too fast to be read: read it again when the run has ended")


def step_limits(parts: Sequence[Part]) -> dict[int, int | None]:
    """Segment -> the step below which its rows stand (None: all)."""
    starts = {part.segment: part.from_step for part in parts}
    limits: dict[int, int | None] = {}
    limit: int | None = None
    for segment in sorted(starts, reverse=True):
        limits[segment] = limit
        start = starts[segment]
        if start is not None:
            limit = start if limit is None else min(limit, start)
    return limits


def last_step(folder: Path) -> int | None:
    """The last standing step of a telemetry folder, from the files' footers; None where nothing stands."""
    # The caller is about to write there, and clears away files that a kill left half written.
    parts = list_parts(folder, warn=False)
    limits = step_limits(parts)
    found: list[int] = []
    for part in parts:
        metadata = pq.read_metadata(part.path)
        column = SCHEMA.get_field_index("step")
        groups = (
            metadata.row_group(number).column(column).statistics for number in range(metadata.num_row_groups)
        )
        limit = limits[part.segment]
        for statistics in groups:
            if (
                statistics is not None
                and statistics.has_min_max
                and (limit is None or statistics.min < limit)
            ):
                found.append(int(statistics.max if limit is None else min(statistics.max, limit - 1)))
    return max(found, default=None)


def write_part(table: pa.Table, part: Part) -> Part:
    """Write a table under a temporary name, push it to the disk, and give it its own name.

    Rows should be sorted by family and statistic: readers skip row groups by the range of those two.

    Returns:
        ``part`` with the number of rows filled in. If writing fails, nothing stays behind.
    """
    body = {
        "version": 1,
        "segment": part.segment,
        "from_step": part.from_step,
        "level": part.level,
        "replaces": list(part.replaces),
    }
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(body).encode()})
    temporary = part.path.with_name(part.path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            pq.write_table(
                table,
                file,
                row_group_size=ROW_GROUP,
                compression="zstd",
                use_dictionary=["family", "site", "statistic", "index"],
                # Steps of one metric rise evenly; statistics computed in float32 leave the low bytes of a double zero.
                column_encoding={"step": "DELTA_BINARY_PACKED", "value": "BYTE_STREAM_SPLIT"},
                write_page_checksum=True,
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(part.path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Part(
        path=part.path,
        segment=part.segment,
        rows=table.num_rows,
        from_step=part.from_step,
        level=part.level,
        replaces=part.replaces,
    )


def read_rows(
    part: Part,
    columns: Sequence[str],
    *,
    family: str | None = None,
    statistic: str | None = None,
    below: int | None = None,
    steps: tuple[int, int] | None = None,
) -> pa.Table:
    """The rows of a part; where given, only of one family or statistic, with step < ``below``, and within ``steps`` (both ends
    included).

    Raises FileNotFoundError when the file was merged into another meanwhile, InputError when it is damaged.
    """
    wanted = {
        name: value for name, value in (("family", family), ("statistic", statistic)) if value is not None
    }
    needed = dict.fromkeys([*columns, *wanted, *(["step"] if below is not None or steps is not None else [])])
    try:
        with pq.ParquetFile(part.path, page_checksum_verification=True) as file:
            groups = [
                number
                for number in range(file.metadata.num_row_groups)
                if all(
                    _may_hold(file.metadata.row_group(number), name, value) for name, value in wanted.items()
                )
                and (steps is None or _may_hold_steps(file.metadata.row_group(number), *steps))
            ]
            table = file.read_row_groups(groups, columns=list(needed))
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise _damaged(part.path, error) from None
    for name, value in wanted.items():
        table = table.filter(pc.equal(table[name], value))
    if steps is not None:
        step = table["step"]
        table = table.filter(pc.and_(pc.greater_equal(step, steps[0]), pc.less_equal(step, steps[1])))
    if below is not None:
        table = table.filter(pc.less(table["step"], below))
    return table.select(list(columns))


def _may_hold(group: Any, name: str, value: str) -> bool:
    """Whether the recorded range of a row group's column may hold the value."""
    statistics = group.column(SCHEMA.get_field_index(name)).statistics
    return statistics is None or not statistics.has_min_max or statistics.min <= value <= statistics.max


def _may_hold_steps(group: Any, first: int, last: int) -> bool:
    """The same for a range of steps."""
    statistics = group.column(SCHEMA.get_field_index("step")).statistics
    return (
        statistics is None
        or not statistics.has_min_max
        or (statistics.min <= last and first <= statistics.max)
    )


def _read_footer(path: Path) -> Part:
    try:
        metadata = pq.read_metadata(path)
        if metadata.schema.names != SCHEMA.names:
            raise ValueError("other columns")
        body = json.loads(metadata.metadata[_METADATA_KEY])
        return Part(
            path=path,
            segment=int(body["segment"]),
            rows=metadata.num_rows,
            from_step=None if body["from_step"] is None else int(body["from_step"]),
            level=int(body["level"]),
            replaces=tuple(body["replaces"]),
        )
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return InputError(
        f"{path} is not a complete telemetry file ({reason}): move it out of the folder to read the rest of the run"
    )

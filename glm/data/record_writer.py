"""Writes records into a Parquet file, a batch at a time, so that memory stays bounded however many there are."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Generic, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

RecordT = TypeVar("RecordT")


class RecordWriter(Generic[RecordT]):
    """Writes objects whose attributes are a schema's columns; a context manager.

    Args:
        path: the file.
        schema: its columns.
        batch: most records to hold in memory.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, batch: int) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._schema, self._batch = schema, batch
        self._held: list[RecordT] = []

    def add(self, record: RecordT) -> None:
        self._held.append(record)
        if len(self._held) >= self._batch:
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._write()
            self._writer.close()
        else:
            # The file is lost; closing it may fail again for the same reason, and would hide the first error.
            with suppress(Exception):
                self._writer.close()

    def _write(self) -> None:
        if self._held:
            columns = {name: [getattr(record, name) for record in self._held] for name in self._schema.names}
            self._writer.write_table(pa.table(columns, schema=self._schema))
            self._held.clear()

"""Writes one TensorBoard event file record by record, and makes the protocol buffers in it.

TensorBoard's own writers queue events in a thread, and silently lose what the disk does not take. Sinks already run beside the
training, so this one writes at once: an error surfaces where it happens, and the file takes half-written records back, which keeps
every later record readable. One record holds all scalars of a step, which takes a tenth of the time of one record for each.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary as made


class EventFile:
    """A new event file in ``folder``; makes the folder if it does not exist."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname() or "localhost"
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        # TensorBoard reads a folder's files in the order of their names: a file made within the same second must come last.
        name = f"events.out.tfevents.{seconds:010d}.{host}.{os.getpid()}.{nanoseconds:09d}"
        self.path = folder / name
        self._file = self.path.open("xb", buffering=0)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, step: int, values: Iterable[Any]) -> None:
        """Write summary values of one step as one record."""
        summary = Summary(value=values)
        if summary.value:
            self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def restart(self, step: int) -> None:
        """Tell readers to drop their steps from ``step`` on."""
        self._write(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        content = record.getbuffer()
        end = self._file.tell()
        written = 0
        try:
            while written < len(content):
                written += self._file.write(content[written:])
        except OSError as error:
            self._file.seek(end)
            self._file.truncate()
            error.filename = str(self.path)
            raise


def scalar(tag: str, value: float) -> Any:
    """A number."""
    return Summary.Value(tag=tag, simple_value=value)


def text(tag: str, markdown: str) -> list[Any]:
    """Text, shown as Markdown."""
    return list(made.text(tag, markdown).value)  # type: ignore[no-untyped-call]


def histogram(tag: str, values: Any) -> list[Any]:
    """A distribution of finite values."""
    return list(made.histogram(tag, values, bins=20).value)  # type: ignore[no-untyped-call]


def layout(charts: Mapping[str, Any]) -> list[Any]:
    """The custom-scalars page."""
    return list(made.custom_scalars(charts).value)  # type: ignore[no-untyped-call]


def hyperparameters(config: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """The values that open a run in the HParams page, and those that end it.

    They leave out the third thing that torch would write, a list of the columns. One run's list would count for all runs, in its
    own order; without it TensorBoard compares the runs, and its columns begin with what differs.
    """
    _, start, end = made.hparams(dict(config), {})  # type: ignore[no-untyped-call]
    return list(start.value), list(end.value)


def picture(tag: str, png: bytes) -> Any:
    """A picture."""
    # A PNG's header has the size at a fixed place.
    pixels = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    image = Summary.Image(encoded_image_string=png, width=pixels[0], height=pixels[1], colorspace=4)
    return Summary.Value(tag=tag, image=image)

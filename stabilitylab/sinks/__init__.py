"""Where numbers go: Parquet for analysis, TensorBoard for looking, memory for notebooks and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stabilitylab.sinks.base import Sink
from stabilitylab.sinks.in_memory import MemorySink
from stabilitylab.sinks.parquet import ParquetSink

if TYPE_CHECKING:
    from stabilitylab.sinks.tensorboard import TensorBoardSink as TensorBoardSink

__all__ = ["MemorySink", "ParquetSink", "Sink", "TensorBoardSink"]


def __getattr__(name: str) -> object:
    # TensorBoard takes a second to import: only who writes its files pays for it.
    if name == "TensorBoardSink":
        from stabilitylab.sinks.tensorboard import TensorBoardSink

        return TensorBoardSink
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

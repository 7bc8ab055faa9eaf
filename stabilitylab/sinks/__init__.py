"""Where numbers go: Parquet files, TensorBoard, memory. Anything with ``write`` and ``close`` is a sink (base.py)."""

from stabilitylab.sinks.base import Sink
from stabilitylab.sinks.memory import MemorySink
from stabilitylab.sinks.parquet import ParquetSink

__all__ = ["MemorySink", "ParquetSink", "Sink"]

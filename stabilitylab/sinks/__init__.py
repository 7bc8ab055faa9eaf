"""Sinks take the numbers: Parquet for analysis, TensorBoard and trackers for looking, memory for notebooks and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stabilitylab.lazy_names import lazy_names
from stabilitylab.sinks.base import Sink
from stabilitylab.sinks.in_memory import MemorySink
from stabilitylab.sinks.parquet import ParquetSink

if TYPE_CHECKING:
    from stabilitylab.sinks.mlflow_sink import MlflowSink as MlflowSink
    from stabilitylab.sinks.tensorboard import TensorBoardSink as TensorBoardSink
    from stabilitylab.sinks.trackio_sink import TrackioSink as TrackioSink
    from stabilitylab.sinks.wandb_sink import WandbSink as WandbSink

# TensorBoard takes a second to import: only those who write its files pay for it.
_LATER = {
    "MlflowSink": "stabilitylab.sinks.mlflow_sink",
    "TensorBoardSink": "stabilitylab.sinks.tensorboard",
    "TrackioSink": "stabilitylab.sinks.trackio_sink",
    "WandbSink": "stabilitylab.sinks.wandb_sink",
}

__all__ = ["MemorySink", "MlflowSink", "ParquetSink", "Sink", "TensorBoardSink", "TrackioSink", "WandbSink"]

__getattr__, __dir__ = lazy_names(__name__, __all__, _LATER)

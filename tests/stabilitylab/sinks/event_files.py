"""Reading TensorBoard's files back with its own reader."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stabilitylab.telemetry import Key, Samples


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in read(folder).Scalars(tag)}


def newest_text(folder: Path, tag: str) -> str:
    return read(folder).Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def loss_of(step: int, value: float) -> Samples:
    return Samples.of([(step, Key("train", "-", "loss"), value)])

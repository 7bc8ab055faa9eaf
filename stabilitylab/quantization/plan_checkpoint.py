"""What was measured so far, in a file from which an interrupted plan resumes.

    {"mark": ...}                              what was measured on: model, text, schemes; another mark starts afresh
    {"path": ..., "schemes": {...}}            a layer, a line each, written when it is done
    {"end": {...}}                             an embedding or output (vocabulary_sensitivity.py)
    {"latencies": {...}}                       of all shapes
    {"text": ..., "plan": ..., "loss": ...}    a whole plan on a text, both by their marks

The last line may be cut off, where a machine went down; the plan measures it again. Numbers come back as they were, to the bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from stabilitylab.models import TextModel, Window
from stabilitylab.quantization.estimate import Estimated, EstimatedLayer
from stabilitylab.quantization.latency import Latencies
from stabilitylab.quantization.ranges import ChannelRange
from stabilitylab.quantization.schemes import LinearScheme
from stabilitylab.quantization.sensitivity import Effect, LayerSensitivity
from stabilitylab.quantization.text_checks import mark_of_windows


class SoFar:
    """Reads what the file holds and adds to it.

    Args:
        file: made when something is added; None keeps nothing.
        mark: of what is measured (``mark_of``).

    Attributes:
        known: layers.
        ends: path -> embedding or output.
        latencies: of all shapes; None where they were not measured.
    """

    def __init__(self, file: Path | None, mark: str) -> None:
        self._file, self._mark = file, mark
        self._begun = False
        self.known: list[EstimatedLayer] = []
        self.ends: dict[str, LayerSensitivity] = {}
        self.latencies: Latencies | None = None
        self._losses: dict[tuple[str, str], float] = {}
        self._read()

    def add(self, layer: EstimatedLayer) -> None:
        """Write a layer down."""
        self._write(dataclasses.asdict(layer))

    def add_end(self, end: LayerSensitivity) -> None:
        """Write an embedding or output down."""
        self.ends[end.path] = end
        self._write({"end": dataclasses.asdict(end)})

    def add_latencies(self, latencies: Latencies) -> None:
        """Write times down."""
        self.latencies = latencies
        self._write({"latencies": {f"{rows}x{columns}": of for (rows, columns), of in latencies.items()}})

    def losses(self, windows: Sequence[Window]) -> MutableMapping[str, float]:
        """Losses on a text by marks of plans; writes down what is set."""
        text = mark_of_windows(windows)
        return _Losses(self, text, {plan: loss for (one, plan), loss in self._losses.items() if one == text})

    def _write(self, data: dict[str, Any]) -> None:
        if self._file is None:
            return
        with self._file.open("a" if self._begun else "w", encoding="utf-8") as out:
            if not self._begun:
                out.write(json.dumps({"mark": self._mark}) + "\n")
            out.write(json.dumps(data) + "\n")
        self._begun = True

    def _read(self) -> None:
        try:
            lines = [] if self._file is None else self._file.read_text("utf-8", errors="replace").split("\n")
        except OSError:
            return
        if not lines or lines[0] != json.dumps({"mark": self._mark}):
            return
        self._begun = True
        layers = {}
        for line in lines[1:]:
            try:
                data = json.loads(line)
                if "end" in data:
                    self.ends[data["end"]["path"]] = _end(data["end"])
                elif "latencies" in data:
                    self.latencies = _latencies(data["latencies"])
                elif "loss" in data:
                    self._losses[data["text"], data["plan"]] = float(data["loss"])
                else:
                    layers[data["path"]] = _layer(data)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        self.known = list(layers.values())
        if lines[-1] and self._file is not None:
            # The next line must not continue one that was cut off.
            with self._file.open("a", encoding="utf-8") as out:
                out.write("\n")


class _Losses(MutableMapping[str, float]):
    def __init__(self, so_far: SoFar, text: str, known: dict[str, float]) -> None:
        self._so_far, self._text, self._known = so_far, text, known

    def __getitem__(self, plan: str) -> float:
        return self._known[plan]

    def __setitem__(self, plan: str, loss: float) -> None:
        self._known[plan] = loss
        self._so_far._write({"text": self._text, "plan": plan, "loss": loss})

    def __delitem__(self, plan: str) -> None:
        del self._known[plan]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def _layer(data: dict[str, Any]) -> EstimatedLayer:
    return EstimatedLayer(
        path=data["path"],
        shape=(data["shape"][0], data["shape"][1]),
        range=ChannelRange(**data["range"]),
        schemes={name: Estimated(**sums) for name, sums in data["schemes"].items()},
    )


def _end(data: dict[str, Any]) -> LayerSensitivity:
    return LayerSensitivity(
        path=data["path"],
        shape=(data["shape"][0], data["shape"][1]),
        range=ChannelRange(**data["range"]),
        effects={name: Effect(**effect) for name, effect in data["effects"].items()},
        also=tuple(data["also"]),
        timed=data["timed"],
    )


def _latencies(data: dict[str, Any]) -> Latencies:
    found = {}
    for shape, schemes in data.items():
        rows, columns = shape.split("x")
        found[int(rows), int(columns)] = {
            name: {int(batch): float(seconds) for batch, seconds in times.items()}
            for name, times in schemes.items()
        }
    return found


def mark_of(model: TextModel, windows: Sequence[Window], schemes: Sequence[LinearScheme], draws: int) -> str:
    """16 hexadecimal digits of what sensitivities depend on: the model, the text as it reads it, the schemes, the draws."""
    return mark_of_windows(windows, f"{model.fingerprint} {draws} {[scheme.name for scheme in schemes]}")
